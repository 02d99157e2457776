//! `FLORENCE.JOBS`, `STATS`, `MODEL` and `HELP`: looking at the module.

use florence_engine::Florence;
use redis_module::{AclPermissions, Context, RedisResult, RedisValue};

use super::args::Args;
use crate::{
    figures::COUNTERS,
    job::{self, State},
    model::{self, Model},
    queue::{queue, retained, waiters},
    server::{
        self,
        reply::{self, bulk},
    },
    settings::{self, Setting},
    source,
};

const DEFAULT_COUNT: i64 = 100;
/// Most jobs that are listed, whatever COUNT says: the main thread looks at each.
const MOST: usize = 1000;

/// `FLORENCE.JOBS [STATE s] [COUNT n]`: keys and states of unfinished jobs, in the order of their turn.
pub(super) fn jobs(ctx: &Context, args: &mut Args) -> RedisResult {
    let (mut state, mut count) = (None, DEFAULT_COUNT);
    while let Some(option) = args.option() {
        match option.to_string_lossy().to_ascii_uppercase().as_str() {
            "STATE" => {
                let name = args.value("STATE")?.as_slice().to_ascii_lowercase();
                let unknown = || {
                    let name = server::printable(&name);
                    reply::error("ERR", format!("unknown state '{name}'"))
                };
                state = Some(State::parse(&name).ok_or_else(unknown)?);
            }
            "COUNT" => count = args.integer("COUNT", 1, 100_000)?,
            _ => return Err(reply::syntax(option.as_slice())),
        }
    }
    let count = usize::try_from(count).unwrap_or_default().min(MOST);
    // Some of them may be hidden from this user, or in another state by now.
    let keys = queue().keys(server::selected_db(ctx), state, 2 * count, |_| true);
    let user = server::user(ctx);
    let found = keys.into_iter().filter_map(|key| {
        // Who may not read a key does not learn of it either.
        let name = server::string(ctx, &key.name);
        if let Some(user) = &user {
            ctx.acl_check_key_permission(user, &name, &AclPermissions::ACCESS).ok()?;
        }
        let found = queue().state(key.as_ref(), &job::open(ctx, &key).ok()?);
        state.is_none_or(|state| state == found).then(|| {
            reply::map([
                ("id", RedisValue::StringBuffer(key.name.to_vec())),
                ("state", bulk(found.name())),
            ])
        })
    });
    Ok(RedisValue::Array(found.take(count).collect()))
}

/// The figures that STATS and INFO show.
pub(super) fn figures() -> Vec<(&'static str, u64)> {
    let (waiting, active) = queue().counts();
    let mut figures = vec![
        ("jobs_waiting", waiting as u64),
        ("jobs_delayed", queue().delayed() as u64),
        ("jobs_active", active as u64),
        ("waiters", waiters::count() as u64),
    ];
    figures.extend(COUNTERS.iter().map(|(name, counter)| (*name, counter.get())));
    let (answers, pictures) = model::caches().bytes();
    let engines = model::engines();
    figures.extend([
        ("engines", engines.len() as u64),
        ("engines_ready", engines.iter().filter(|engine| engine.is_ready()).count() as u64),
        ("cache_result_bytes", answers),
        ("cache_feature_bytes", pictures),
        ("retained_bytes", retained::bytes()),
    ]);
    figures.extend(memory());
    figures
}

/// What the engine holds beside the server's own memory.
fn memory() -> [(&'static str, u64); 5] {
    let (mut mapped, mut owned) = (0, 0);
    for engine in model::engines() {
        if let Model::Ready(loaded) = &engine.model
            && !loaded.florence.shares_weights()
        {
            let weights = loaded.florence.model().weight_bytes();
            (mapped, owned) = (mapped + weights.mapped, owned + weights.owned);
        }
    }
    let (answers, pictures) = model::caches().bytes();
    [
        ("memory_weights_mapped", mapped),
        ("memory_weights_packed", owned),
        ("memory_caches", answers + pictures),
        ("memory_work", model::work().used()),
        ("memory_work_peak", model::work().peak()),
    ]
}

/// `FLORENCE.HOSTS`: for operators, since it tells where all pictures come from.
pub(super) fn hosts(_ctx: &Context, args: &mut Args) -> RedisResult {
    args.finish()?;
    let integer = |n: u64| RedisValue::Integer(i64::try_from(n).unwrap_or(i64::MAX));
    let rows = source::hosts().into_iter().map(|(host, figures)| {
        reply::map([
            ("host", bulk(host)),
            ("downloads", integer(figures.downloads)),
            ("failures", integer(figures.failures)),
            ("bytes", integer(figures.bytes)),
            ("ms_total", integer(figures.ms)),
        ])
    });
    Ok(RedisValue::Array(rows.collect()))
}

/// `FLORENCE.STATS`
pub(super) fn stats(_ctx: &Context, args: &mut Args) -> RedisResult {
    args.finish()?;
    let integer = |n: u64| RedisValue::Integer(i64::try_from(n).unwrap_or(i64::MAX));
    Ok(reply::map(figures().into_iter().map(|(name, n)| (name, integer(n)))))
}

/// `FLORENCE.MODEL`
pub(super) fn model(_ctx: &Context, args: &mut Args) -> RedisResult {
    args.finish()?;
    let (state, loaded, error) = match model::model() {
        Model::Loading => ("loading", None, RedisValue::Null),
        Model::Ready(loaded) => ("ready", Some(loaded), RedisValue::Null),
        Model::Failed(problem) => ("failed", None, bulk(problem)),
    };
    let florence = loaded.as_ref().map(|loaded| &loaded.florence);
    let name = florence.map_or(RedisValue::Null, |florence| bulk(florence.name()));
    let device = florence.map_or(RedisValue::Null, |_loaded| bulk(devices()));
    let note = florence.and_then(model::note).map_or(RedisValue::Null, bulk);
    let arithmetic = florence.map(Florence::arithmetic).unwrap_or_default();
    let (precision, kernels) = arithmetic.split_once(' ').unwrap_or_default();
    Ok(reply::map([
        ("state", bulk(state)),
        ("name", name),
        ("directory", bulk(settings::MODEL.text())),
        ("device", device),
        ("precision", bulk(precision)),
        ("kernels", bulk(kernels)),
        ("error", error),
        ("note", note),
    ]))
}

/// What the engines run on that are ready, each device once.
fn devices() -> String {
    let mut names: Vec<String> = Vec::new();
    for engine in model::engines() {
        if let Model::Ready(loaded) = &engine.model
            && !names.iter().any(|name| name == loaded.florence.device())
        {
            names.push(loaded.florence.device().to_owned());
        }
    }
    names.join("; ")
}

/// `FLORENCE.HELP`
pub(super) fn help(_ctx: &Context, args: &mut Args) -> RedisResult {
    args.finish()?;
    let lines = [
        "FLORENCE.SUBMIT key image prompt|PROMPTS n prompt [prompt ...] [PRIORITY n] [DELAY ms] [EXPIRES ms]",
        "    [TIMEOUT ms] [RETRIES n] [TTL s] [BEAMS n] [MAXTOKENS n] [MODEL name] [EXIF|NOEXIF]",
        "    [NOCACHE]",
        "    key: * lets the server choose. image: an http(s), gs, s3 or data URL, an absolute path or",
        "    file:// URL below florence.file-roots, DATA bytes, or KEY key. prompt: <CAPTION>, <OD>, ...",
        "FLORENCE.GET key [RESULT]",
        "FLORENCE.WAIT key [key ...] timeout",
        "FLORENCE.CANCEL key [key ...]",
        "FLORENCE.RETRY key [key ...]",
        "FLORENCE.JOBS [STATE state] [COUNT n]",
        "FLORENCE.STATS",
        "FLORENCE.HOSTS",
        "FLORENCE.MODEL",
        "FLORENCE.HELP",
    ];
    Ok(RedisValue::Array(lines.into_iter().map(bulk).collect()))
}
