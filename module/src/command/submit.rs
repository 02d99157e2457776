//! `FLORENCE.SUBMIT key image prompt [option ...]`: creates a job; `PROMPTS n prompt ...` in the
//! prompt's place asks several questions about one picture.
//!
//! All that can be refused is refused here, before anything is stored. The job is queued by what its
//! hash says, like a job that comes from a file, a master or a migration.

use redis_module::{
    AclPermissions, Context, ContextFlags, RedisError, RedisResult, RedisString, RedisValue,
};

use florence_engine::chain::{Link, Step};

use super::args::{Args, is_word, utf8};
use crate::{
    job::{
        Job, JobKey, NoJob, limits,
        new::{self, Bytes, Options, Picture},
    },
    queue::{queue, sync},
    server::{self, NoString, printable, reply},
    source,
};

pub(super) fn run(ctx: &Context, args: &mut Args) -> RedisResult {
    let key = args.next()?;
    let (picture, refused) = picture(ctx, &key, args)?;
    let prompts = prompts(args)?;
    let options = options(ctx, &key, args)?;

    let user = server::user_name(ctx);
    let new = new::new(&user, picture, &prompts, &options);
    let key = if key.as_slice() == b"*" { new_key(ctx) } else { key };
    limits::check_key_bytes(key.as_slice().len())?;
    let name = RedisValue::StringBuffer(key.as_slice().to_vec());
    let job = Job::open(ctx, &key);
    // The same request again: the reply of the first one was lost. It was taken then, whatever the
    // settings are now.
    if job.as_ref().is_ok_and(|job| new.has_made(job)) {
        return Ok(name);
    }
    let found = job.map(drop);
    if let Some(refused) = refused {
        return Err(refused);
    }
    new::check(&prompts, &options)?;
    match found {
        Ok(()) => return Err(reply::error("JOBEXISTS", "another job lives under this key")),
        Err(NoJob::WrongType | NoJob::Foreign) => return Err(RedisError::WrongType),
        Err(NoJob::Missing) => {}
    }
    queue().check_room(&user, 1, 1, options.delay.is_some_and(|delay| delay > 0))?;
    let seen = new::store(ctx, &key, new);
    sync::created(&JobKey { db: server::selected_db(ctx), name: key.as_slice().into() }, &seen);
    Ok(name)
}

/// The picture; if a new job is refused because of it, also why.
fn picture(
    ctx: &Context,
    job: &RedisString,
    args: &mut Args,
) -> Result<(Picture, Option<RedisError>), RedisError> {
    let first = args.next()?;
    if is_word(&first, "DATA") {
        let picture = Picture::sent("DATA".to_owned(), Bytes::Servers(args.next()?))?;
        return Ok((picture, None));
    }
    if !is_word(&first, "KEY") {
        return Ok(or_named(Picture::at(first.as_slice()), first.as_slice()));
    }
    let key = args.next()?;
    check_slots(ctx, job, &key)?;
    check_rights(ctx, &key, &AclPermissions::ACCESS, "this user may not read the image key")?;
    let source = format!("KEY {}", key.to_string_lossy());
    let bytes = string_key(ctx, &key);
    let picture = bytes.and_then(|bytes| Picture::sent(source.clone(), Bytes::Servers(bytes)));
    Ok(or_named(picture, source.as_bytes()))
}

/// In the place of a picture that is refused, what the request calls it.
fn or_named(picture: Result<Picture, RedisError>, source: &[u8]) -> (Picture, Option<RedisError>) {
    match picture {
        Ok(picture) => (picture, None),
        Err(refused) => (Picture::named(source), Some(refused)),
    }
}

/// One prompt, or PROMPTS and several different ones.
fn prompts(args: &mut Args) -> Result<Vec<String>, RedisError> {
    let first = args.next()?;
    if !is_word(&first, "PROMPTS") {
        return Ok(vec![prompt(&first)?]);
    }
    let mut prompts: Vec<String> = Vec::new();
    let count = args.limited(limits::PROMPTS)?;
    for i in 0..count {
        let missing = || reply::error("ERR", format!("PROMPTS {count} is followed by {i} prompts"));
        let prompt = prompt(&args.option().ok_or_else(missing)?)?;
        if prompts.contains(&prompt) {
            let text = format!("the prompt {} is given twice", printable(prompt.as_bytes()));
            return Err(reply::error("BADPROMPT", text));
        }
        prompts.push(prompt);
    }
    Ok(prompts)
}

/// A prompt that may be short enough: nothing is done with others.
fn prompt(arg: &RedisString) -> Result<String, RedisError> {
    limits::check_prompt_bytes(arg.len())?;
    utf8(arg, "the prompt")
}

/// Not every server looks at other keys than the first when it routes the command.
fn check_slots(ctx: &Context, job: &RedisString, other: &RedisString) -> Result<(), RedisError> {
    if server::share_slot(ctx, job.as_slice(), other.as_slice()) {
        return Ok(());
    }
    Err(reply::error("CROSSSLOT", "Keys in request don't hash to the same slot"))
}

/// The bytes of a string key.
fn string_key(ctx: &Context, key: &RedisString) -> Result<RedisString, RedisError> {
    server::string_of(ctx, key, source::check_size).map_err(|problem| match problem {
        NoString::Missing => reply::error("ERR", "the image key does not exist"),
        NoString::WrongType => RedisError::WrongType,
        NoString::Refused(error) => error,
    })
}

/// The server looks only at the first word of the command that may announce a key.
fn check_rights(
    ctx: &Context,
    key: &RedisString,
    permissions: &AclPermissions,
    denied: &str,
) -> Result<(), RedisError> {
    let Some(user) = server::user(ctx) else { return Ok(()) };
    let allowed = ctx.acl_check_key_permission(&user, key, permissions);
    allowed.map_err(|_denied| reply::error("NOPERM", denied))
}

/// The key of a stream that the calling user may add to.
fn stream(ctx: &Context, job: &RedisString, key: &RedisString) -> Result<Vec<u8>, RedisError> {
    let (length, most) = (key.len(), limits::STREAM_BYTES);
    if length > most {
        let text = format!("the stream's key has {length} bytes, more than {most}");
        return Err(reply::error("ERR", text));
    }
    check_slots(ctx, job, key)?;
    check_rights(ctx, key, &AclPermissions::INSERT, "this user may not write the stream")?;
    if key.as_slice() == job.as_slice() {
        return Err(reply::error("ERR", "the job and its stream are the same key"));
    }
    Ok(key.as_slice().to_vec())
}

fn options(ctx: &Context, job: &RedisString, args: &mut Args) -> Result<Options, RedisError> {
    let mut options = Options::default();
    while let Some(option) = args.option() {
        match option.to_string_lossy().to_ascii_uppercase().as_str() {
            "PRIORITY" => options.priority = args.limited(limits::PRIORITY)?,
            "DELAY" => options.delay = Some(args.limited(limits::DELAY)?),
            "EXPIRES" => options.expires = Some(args.limited(limits::EXPIRES)?),
            "MODEL" => options.model = Some(model(&args.value("MODEL")?)?),
            "TIMEOUT" => options.timeout = Some(args.limited(limits::TIMEOUT)?),
            "RETRIES" => options.retries = Some(args.limited(limits::RETRIES)?),
            "TTL" => options.ttl = Some(args.limited(limits::TTL)?),
            "BEAMS" => options.beams = Some(args.limited(limits::BEAMS)?),
            "NBEST" => options.n_best = Some(args.limited(limits::N_BEST)?),
            "MAXTOKENS" => options.max_tokens = Some(args.limited(limits::MAX_TOKENS)?),
            "EXIF" => options.exif = Some(true),
            "NOEXIF" => options.exif = Some(false),
            "NOCACHE" => options.no_cache = true,
            "TEMPERATURE" => options.temperature = Some(args.ranged(limits::TEMPERATURE)?),
            "TOPK" => options.top_k = Some(args.limited(limits::TOP_K)?),
            "TOPP" => options.top_p = Some(args.ranged(limits::TOP_P)?),
            "SEED" => options.seed = Some(args.limited(limits::SEED)?),
            "LENGTHPENALTY" => {
                options.length_penalty = Some(args.ranged(limits::LENGTH_PENALTY)?);
            }
            "NGRAM" => options.ngram = Some(args.limited(limits::NGRAM)?),
            "MARGIN" => options.margin = Some(args.limited(limits::MARGIN)?),
            word if let Some(link) = Link::named(word) => {
                options.steps.push(Step { link, prompt: prompt(&args.value(word)?)? });
            }
            "THUMBNAIL" => options.thumbnail = Some(args.limited(limits::THUMBNAIL)?),
            "TOKENS" => options.stream = Some(stream(ctx, job, &args.value("TOKENS")?)?),
            _ => return Err(reply::syntax(option.as_slice())),
        }
    }
    Ok(options)
}

fn model(arg: &RedisString) -> Result<String, RedisError> {
    let (length, most) = (arg.len(), limits::MODEL_BYTES);
    if length > most {
        let text = format!("the model's name has {length} bytes, more than {most}");
        return Err(reply::error("ERR", text));
    }
    utf8(arg, "the model's name")
}

/// `florence:` and a ULID: sortable by time, unique without asking anyone. In a cluster with the
/// hash tag of `*` itself: servers take every key that a command writes for one of the slot that
/// it was routed by.
fn new_key(ctx: &Context) -> RedisString {
    const CROCKFORD: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    let mut number = u128::from(server::unix_ms().unsigned_abs()) << 80;
    for (i, byte) in server::random::<10>().into_iter().enumerate() {
        number |= u128::from(byte) << (8 * i);
    }
    let mut name = b"florence:".to_vec();
    if ctx.get_flags().contains(ContextFlags::CLUSTER) {
        name.extend(b"{*}:");
    }
    name.extend((0..26).rev().map(|i| CROCKFORD[(number >> (5 * i)) as usize & 31]));
    server::string(ctx, &name)
}
