//! `FLORENCE.MODEL [LOAD name directory [PRECISION p] [ADAPTER directory]|UNLOAD name|DEFAULT name]`:
//! which models there are, and which there shall be.
//!
//! Only who may run `FLORENCE.MODEL.CHANGE`, by which name the changes can be sent too, may change
//! them: a right of its own, where a command has one for all of its words.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use florence_engine::{Florence, Precision};
use redis_module::{Context, ContextFlags, RedisError, RedisResult, RedisString, RedisValue};

use super::args::{Args, is_word};
use crate::{
    model::{self, Hosted, Model, Recipe},
    server::{
        self, Asking,
        reply::{self, bulk},
    },
    settings, work,
};

/// `FLORENCE.MODEL`
pub(super) fn run(ctx: &Context, args: &mut Args) -> RedisResult {
    let Some(word) = args.option() else { return Ok(all()) };
    change_by(ctx, &word, args)
}

/// `FLORENCE.MODEL.CHANGE`
pub(super) fn change(ctx: &Context, args: &mut Args) -> RedisResult {
    let word = args.next()?;
    change_by(ctx, &word, args)
}

fn may_change(ctx: &Context) -> Result<(), RedisError> {
    const COMMAND: [&[u8]; 3] = [b"florence.model.change", b"DEFAULT", b"name"];
    // Where the server knows no categories of modules' commands, a rule such as -@admin says nothing
    // of ours: there this one of its own stands for it.
    const LIKE_IT: [&[u8]; 4] = [b"config", b"set", b"florence.paused", b"no"];
    let Some(user) = server::user(ctx) else { return Ok(()) };
    let may_run = |command: &[&[u8]]| server::may_run(ctx, user.as_slice(), command);
    if may_run(&COMMAND) && (server::has_categories() || may_run(&LIKE_IT)) {
        return Ok(());
    }
    let text = "only users who may run 'florence.model.change' may change models";
    Err(reply::error("NOPERM", text))
}

fn change_by(ctx: &Context, word: &RedisString, args: &mut Args) -> RedisResult {
    may_change(ctx)?;
    if is_word(word, "LOAD") {
        return load(ctx, args);
    }
    let change = match () {
        () if is_word(word, "UNLOAD") => work::unload_model,
        () if is_word(word, "DEFAULT") => work::make_default_model,
        () => return Err(reply::syntax(word.as_slice())),
    };
    let name = args.next()?.to_string_lossy();
    args.finish()?;
    match change(&name) {
        Ok(()) => Ok(OK),
        Err(problem) => Err(reply::error("NOMODEL", problem)),
    }
}

fn name(args: &mut Args) -> Result<String, RedisError> {
    let name = args.next()?.to_string_lossy();
    if settings::is_model_name(&name) {
        return Ok(name);
    }
    let most = settings::MODEL_BYTES;
    let text = format!("a model's name has letters, digits and ._+-, at most {most} of them");
    Err(reply::error("ERR", text))
}

/// Replies once the model answers, or cannot.
fn load(ctx: &Context, args: &mut Args) -> RedisResult {
    let (name, directory) = (name(args)?, path(&args.next()?)?);
    let (mut precision, mut adapter) = (*settings::PRECISION.get(), None);
    while let Some(option) = args.option() {
        if is_word(&option, "PRECISION") {
            let value = args.value("PRECISION")?.to_string_lossy();
            let wrong = |problem: florence_engine::Error| reply::error("ERR", problem);
            precision = value.parse::<Precision>().map_err(wrong)?;
        } else if is_word(&option, "ADAPTER") {
            adapter = Some(path(&args.value("ADAPTER")?)?);
        } else {
            return Err(reply::syntax(option.as_slice()));
        }
    }
    if ctx.get_flags().contains(ContextFlags::DENY_BLOCKING) {
        let text = "a model cannot be loaded in a transaction or script: loading takes its time";
        return Err(reply::error("ERR", text));
    }
    let client = Asking::begin(ctx);
    let load = move || {
        let adapter = adapter.as_deref().map(found).transpose()?;
        let directory = Some(found(&directory)?);
        let (is_of_settings, is_tried) = (false, true);
        let recipe = Recipe { directory, adapter, precision, is_of_settings, is_tried };
        work::load_model(name, recipe).map_err(|why| reply::error("ERR", why))
    };
    let answer = move || {
        if let Some(loaded) = server::catch(|| "loading a model".to_owned(), load) {
            client.reply(loaded.map(|()| OK));
        }
    };
    // Whatever becomes of the thread, its end is a reply.
    if let Err(problem) = thread::Builder::new().name("fl-load".to_owned()).spawn(answer) {
        server::warn(&format!("cannot start a thread that loads a model: {problem}"));
    }
    Ok(RedisValue::NoReply)
}

const OK: RedisValue = RedisValue::SimpleStringStatic("OK");

fn path(text: &RedisString) -> Result<PathBuf, RedisError> {
    let path = PathBuf::from(text.to_string_lossy());
    if path.is_absolute() {
        return Ok(path);
    }
    Err(reply::error("ERR", format!("'{}' is no absolute path", path.display())))
}

/// Where a directory is, wherever links lead, if that is below one of `florence.model-roots`.
fn found(directory: &Path) -> Result<PathBuf, RedisError> {
    let roots = settings::MODEL_ROOTS.get();
    let mut roots = roots.0.iter().filter_map(|root| root.canonicalize().ok());
    let found = directory.canonicalize().ok().filter(|found| found.is_dir());
    found.filter(|found| roots.any(|root| found.starts_with(root))).ok_or_else(|| {
        let directory = directory.display();
        reply::error("DENIED", format!("{directory} is no directory below florence.model-roots"))
    })
}

/// The default model, and all of them.
fn all() -> RedisValue {
    let default = model::find(None);
    let mut told = match &default {
        Some(model) => describe(model),
        None => vec![("state", bulk("loading")), ("name", RedisValue::Null)],
    };
    let each = |model: &Arc<Hosted>| {
        let is_default = RedisValue::Integer(model::is_default(model).into());
        let mut told = describe(model);
        told.push(("default", is_default));
        reply::map(told)
    };
    told.push(("models", RedisValue::Array(model::named().iter().map(each).collect())));
    reply::map(told)
}

fn describe(model: &Hosted) -> Vec<(&'static str, RedisValue)> {
    let progress = model.model();
    let (loaded, error) = match &progress {
        Model::Loading => (None, RedisValue::Null),
        Model::Ready(loaded) => (Some(loaded), RedisValue::Null),
        Model::Failed(problem) => (None, bulk(problem)),
    };
    let florence = loaded.map(|loaded| &loaded.florence);
    let device = florence.map_or(RedisValue::Null, |_loaded| bulk(devices(model)));
    let note = florence.and_then(model::note).map_or(RedisValue::Null, bulk);
    let arithmetic = florence.map(Florence::arithmetic).unwrap_or_default();
    let (precision, kernels) = arithmetic.split_once(' ').unwrap_or_default();
    let path = |path: &Option<PathBuf>| {
        bulk(path.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default())
    };
    vec![
        ("state", bulk(progress.state())),
        ("name", bulk(&model.name)),
        ("directory", path(&model.recipe.directory)),
        ("adapter", path(&model.recipe.adapter)),
        ("device", device),
        ("precision", bulk(precision)),
        ("kernels", bulk(kernels)),
        ("error", error),
        ("note", note),
    ]
}

/// What the engines run on that are ready, each device once.
fn devices(model: &Hosted) -> String {
    let mut names: Vec<String> = Vec::new();
    for engine in model.engines() {
        if let Model::Ready(loaded) = &engine.model
            && !names.iter().any(|name| name == loaded.florence.device())
        {
            names.push(loaded.florence.device().to_owned());
        }
    }
    names.join("; ")
}
