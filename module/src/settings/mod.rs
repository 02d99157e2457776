//! The settings, as `CONFIG SET florence.*`, redis.conf and `loadmodule` arguments know them.
//!
//! One table: name, default, what is allowed, when it can be changed, what it means. Values are
//! parsed once, when they are set; a bad one is refused with a message that names the setting, the
//! value and what is allowed. README.md and docs/CELERY.md show the table, and a test compares.
//!
//! - `kinds`: numbers, sizes, yes or no, and parsed texts
//! - `values`: what the texts are parsed to

mod kinds;
mod values;

use florence_engine::{
    Coordinates, Decimals, Precision, TokenIds,
    fetch::{Authorities, Buckets, Hosts, Networks},
    image::Formats,
    prompt::Prompts,
};

pub(crate) use kinds::Setting;
use kinds::{About, Change, Flag, Number, Parsed};
pub(crate) use values::{
    CpuList, Devices, MODEL_BYTES, Models, Parameters, Queues, Roots, Signatures, Steps,
    is_model_name,
};

macro_rules! settings {
    ($(
        $static:ident: $kind:ident $(<$value:ty>)? $(($($allowed:expr),+))?,
        $name:literal, $default:literal, $change:ident, $meaning:literal;
    )*) => {
        $(
            #[doc = $meaning]
            pub(crate) static $static: $kind $(<$value>)? = $kind::new(
                About {
                    name: $name,
                    default: $default,
                    change: Change::$change,
                    meaning: $meaning,
                }
                $($(, $allowed)+)?
            );
        )*

        /// All settings, in the order of the documentation.
        pub(crate) static TABLE: &[&dyn Setting] = &[$(&$static),*];
    };
}

settings! {
    MODEL: Parsed<String>("a directory"), "model", "", AtStart,
        "checkpoint directory; without one, the embedded tiny model";
    ADAPTER: Parsed<String>("a directory"), "adapter", "", AtStart,
        "directory of a PEFT adapter (LoRA) that is merged into the checkpoint's weights";
    MODELS: Parsed<Models>("name=directory or name=directory,adapter, several separated by spaces"), "models", "", AtStart,
        "other models that jobs can ask for by name, each with the directory of its checkpoint and perhaps of an adapter; where `model` has none, the first of them is the default";
    MODEL_ROOTS: Parsed<Roots>("absolute paths of directories that are there, separated by spaces"), "model-roots", "", AtStart,
        "directories that `FLORENCE.MODEL LOAD` may load from";
    TOKENIZER: Parsed<String>("a directory"), "tokenizer", "", AtStart,
        "directory whose tokenizer is taken instead of the checkpoint's, for fine-tunes that have none";
    TOKEN_IDS: Parsed<TokenIds>("checkpoint or tokenizer"), "token-ids", "checkpoint", AtStart,
        "which tokens begin and end answers: `checkpoint` takes those that its files give, as the reference does, `tokenizer` its `<s>` and `</s>`, for fine-tunes whose files are wrong";
    KEEP_PACKED: Flag, "keep-packed", "yes", AtStart,
        "keeps the packed weights in a file, which the next start and all servers of the host map; it is as large as the weights; where it cannot be written they are packed in memory";
    PACKED_DIRECTORY: Parsed<String>("a directory"), "packed-directory", "", AtStart,
        "directory of that file, which may serve several checkpoints; without one, the checkpoint's own, which a server often may not write to";
    PRECISION: Parsed<Precision>("f32, int16, int8, bf16 or auto"), "precision", "f32", AtStart,
        "`f32` gives the reference's answers; `auto` the fastest that agrees with it in 99.8 % of the tokens: `int16` products where the CPU has AVX2 (with VNNI or in AMX's tiles where those are faster), else `f32`; `bf16` is a little faster than VNNI's `int16` and further away (AVX512-BF16); `int8` is `int16` with those products in int8 that the model's plan has, which `florence tune` makes";
    DEVICE: Parsed<Devices>("cpu, auto, or devices such as cuda:0 cuda:1"), "device", "cpu", AtStart,
        "where the model runs; each GPU has an engine of its own. `cuda:N` (`cuda` is the first) needs a build for CUDA (`make cuda`), and there `precision` is `f32` or `bf16`, which `auto` takes; `auto` is the first GPU, or where there is none the CPU";
    ENGINES: Number(1, 64), "engines", "1", AtStart,
        "engines on the CPU, which share `threads`, `cpus` and the weights: each has jobs of its own, and with several one picture takes longer, but many are answered sooner";
    COORDINATES: Parsed<Coordinates>("float or int"), "coordinates", "float", AtStart,
        "`float` as in Microsoft's code, `int` as in transformers' own";
    DECIMALS: Parsed<Decimals>("all, or a whole number from 0 to 9"), "decimals", "all", AnyTime,
        "digits after the point of coordinates in answers from now on, cached ones too; `all` as in Microsoft's code";
    PROMPTS: Parsed<Prompts>("tasks or any"), "prompts", "tasks", AnyTime,
        "`tasks` takes the fifteen tasks, and refuses typing errors; with `any` the model is asked every other text as it is, as fine-tuned checkpoints need";
    EXIF: Flag, "exif", "no", AnyTime,
        "whether pictures are turned as their EXIF tag says, as phones mean them; the reference does not; options `EXIF` and `NOEXIF` of SUBMIT go before it";
    ALLOW_NETWORKS: Parsed<Networks>("networks, such as 10.1.0.0/16 ::1"), "allow-networks", "", AtStart,
        "networks besides the public ones that URLs may reach";
    DENY_NETWORKS: Parsed<Networks>("networks, such as 10.1.0.0/16 ::1"), "deny-networks", "", AtStart,
        "public networks that they may not reach";
    ALLOW_HOSTS: Parsed<Hosts>("hosts, such as example.com *.example.com"), "allow-hosts", "", AtStart,
        "the only hosts that URLs may name; all, if there is none";
    DENY_HOSTS: Parsed<Hosts>("hosts, such as example.com *.example.com"), "deny-hosts", "", AtStart,
        "hosts that they may not name";
    CA_FILE: Parsed<Authorities>("a file of certificates in PEM"), "ca-file", "", AtStart,
        "authorities that are trusted besides the system's, or where it has none besides the built-in ones";
    BUCKETS: Parsed<Buckets>("buckets, such as gs://one s3://two"), "buckets", "", AtStart,
        "buckets that are read with the server's credentials (below)";
    FILE_ROOTS: Parsed<Roots>("absolute paths of directories that are there, separated by spaces"), "file-roots", "", AnyTime,
        "directories that pictures may be read from";
    THREADS: Number(0, 1024), "threads", "0", AtStart,
        "compute threads; 0 is one less than there are cores";
    NICE: Number(0, 19), "nice", "5", AtStart, "niceness of the compute threads";
    CPUS: Parsed<CpuList>("CPUs of this machine and ranges of them, such as 1-3 8"), "cpus", "", AtStart,
        "CPUs that the compute threads are pinned to, one each, in turns";
    PREPARE_THREADS: Number(0, 256), "prepare-threads", "0", AtStart,
        "threads that decode pictures at hand, and so many downloaded ones are decoded at a time; 0 is half as many as there are cores, and at least 4";
    MAX_DOWNLOADS: Number(1, 1024), "max-downloads", "64", AtStart,
        "downloads at a time, each in a thread that mostly waits";
    MAX_DOWNLOADS_PER_HOST: Number(1, 1024), "max-downloads-per-host", "16", AnyTime,
        "downloads at a time from one host and port";
    MAX_DOWNLOADS_PER_USER: Number(1, 1024), "max-downloads-per-user", "48", AnyTime,
        "downloads at a time for one user";
    PAUSED: Flag, "paused", "no", AnyTime,
        "starts no job; what is at work goes on to its end, and all else works";
    MAX_BATCH: Number(1, 64), "max-batch", "16", AnyTime, "jobs that are decoded together";
    KV_CACHE_BYTES: Number(1_048_576, 1_099_511_627_776), "kv-cache-bytes", "4294967296", AnyTime,
        "memory that the keys and values of all jobs that are decoded may take, each reckoned at its longest answer; jobs wait for room";
    MAX_REGIONS: Number(1, 256), "max-regions", "64", AnyTime,
        "regions of an answer that `EACH` and `CROP` ask about; the others are left out, and counted";
    MAX_QUEUE: Number(1, 10_000_000), "max-queue", "100000", AnyTime,
        "jobs that may wait for their turn, or to be tried again; beyond it SUBMIT answers `-BUSY`";
    MAX_QUEUE_PER_USER: Number(0, 10_000_000), "max-queue-per-user", "0", AnyTime,
        "jobs of one user that may wait, delayed ones too; 0 sets no bound";
    MAX_DELAYED: Number(1, 10_000_000), "max-delayed", "100000", AnyTime,
        "jobs that may wait for their DELAY to pass; they do not count for `max-queue`";
    MAX_IMAGE_BYTES: Number(1024, 536_870_912), "max-image-bytes", "33554432", AnyTime,
        "largest picture";
    MAX_IMAGE_PIXELS: Number(1, 1_000_000_000), "max-image-pixels", "100000000", AnyTime,
        "largest picture, by its header";
    WORK_BYTES: Number(1_048_576, 1_099_511_627_776), "work-bytes", "1073741824", AnyTime,
        "memory that decoding pictures may take all together; jobs wait for room";
    IMAGE_FORMATS: Parsed<Formats>("some of jpeg png webp gif bmp tiff"), "image-formats", "jpeg png webp gif bmp", AtStart,
        "formats that are decoded";
    THUMBNAILS: Number(0, 1024), "thumbnails", "0", AnyTime,
        "longer side in pixels of the small copy of its picture that every job gets, a JPEG in its field `thumbnail`; 0 for none; option `THUMBNAIL` of SUBMIT goes before it";
    FETCH_TIMEOUT_MS: Number(1, 3_600_000), "fetch-timeout-ms", "30000", AnyTime, "one download";
    RETRY_DELAY_MS: Number(1, 3_600_000), "retry-delay-ms", "1000", AnyTime,
        "pause before the first retry; doubles";
    DEFAULT_TIMEOUT_MS: Number(1, 86_400_000), "default-timeout-ms", "300000", AnyTime,
        "TIMEOUT of a job that gives none";
    DEFAULT_RETRIES: Number(0, 100), "default-retries", "3", AnyTime,
        "RETRIES of a job that gives none";
    DEFAULT_TTL: Number(0, 315_360_000), "default-ttl", "86400", AnyTime,
        "TTL of a job that gives none, seconds; 0 keeps it";
    RESULT_CACHE_BYTES: Number(0, 1_099_511_627_776), "result-cache-bytes", "67108864", AtStart,
        "answers that are kept for the same request, 0 for none";
    FEATURE_CACHE_BYTES: Number(0, 1_099_511_627_776), "feature-cache-bytes", "268435456", AtStart,
        "encoded pictures that are kept for other prompts, 0 for none";
    SHARED_CACHE: Flag, "shared-cache", "no", AnyTime,
        "whether a user's answers and encoded pictures serve other users too: then a job's `cache` tells what others have asked";
    ENDED_JOBS: Number(0, 1_000_000), "ended-jobs", "10000", AnyTime,
        "ended jobs of each state and database that JOBS can list, the newest ones";
    RETAIN_BYTES: Number(0, 1_099_511_627_776), "retain-bytes", "0", AtStart,
        "budget for ended jobs, the oldest go first; 0 leaves them to their TTL";
    PUBLISH: Flag, "publish", "yes", AnyTime, "publishes the end of every job";
    STREAM: Parsed<String>("a key"), "stream", "", AnyTime,
        "stream that jobs are added to when they end";
    STREAM_LENGTH: Number(1, 1_000_000_000), "stream-length", "10000", AnyTime,
        "entries that it keeps, about";
    TOKENS_LENGTH: Number(1, 1_000_000_000), "tokens-length", "10000", AnyTime,
        "entries that a stream of `TOKENS` keeps, about";
    CELERY_QUEUES: Parsed<Queues>("queue:task, several separated by spaces"), "celery-queues", "", AtStart,
        "what is taken from which queue; a queue may be named several times";
    CELERY_ARGUMENTS: Parsed<Signatures>("signatures, such as (image_url, prompt) tasks.ask(question:prompt, path:picture)"), "celery-arguments", "(url, task_prompt)", AtStart,
        "how the tasks are called (below)";
    CELERY_DB: Number(0, 1_000_000), "celery-db", "0", AtStart, "database of the broker URL";
    CELERY_RESULT_DB: Number(0, 1_000_000), "celery-result-db", "0", AtStart,
        "database of the result backend";
    CELERY_PREFIX: Parsed<String>("a text"), "celery-prefix", "", AtStart,
        "`global_keyprefix` of the broker's transport options";
    CELERY_RESULT_PREFIX: Parsed<String>("a text"), "celery-result-prefix", "", AtStart,
        "`global_keyprefix` of the backend's transport options";
    CELERY_PRIORITY_STEPS: Parsed<Steps>("numbers from 0 to 9, such as 0 3 6 9"), "celery-priority-steps", "0 3 6 9", AtStart,
        "`priority_steps` of the broker's transport options";
    CELERY_SEPARATOR: Parsed<String>("a text"), "celery-separator", "\x06\x16", AtStart,
        "`sep` of the broker's transport options";
    CELERY_RESULT_EXPIRES: Number(0, 315_360_000), "celery-result-expires", "86400", AnyTime,
        "`result_expires`, seconds; 0 keeps results";
    CELERY_TRACK_STARTED: Flag, "celery-track-started", "no", AnyTime, "`task_track_started`";
    CELERY_EVENTS: Flag, "celery-events", "yes", AnyTime,
        "task and worker events, for Flower and `celery events`";
    CELERY_REJECT_UNKNOWN: Flag, "celery-reject-unknown", "no", AtStart,
        "answers other tasks of the queues with `NotRegistered`, and moves what is no task to the list `florence:celery-rejected` (the last 100); otherwise both are left in their list, for other workers";
    CELERY_NAME: Parsed<String>("a text"), "celery-name", "florence@%h", AtStart,
        "the worker's name; `%h` is the host's";
}

/// The setting of a name.
pub(crate) fn find(name: &str) -> Option<&'static dyn Setting> {
    TABLE.iter().copied().find(|setting| setting.about().name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A setting's row in the documentation.
    fn row(setting: &dyn Setting) -> String {
        let About { name, default, change, meaning } = setting.about();
        let default = match *default {
            "" => "none".to_owned(),
            "\x06\x16" => "bytes 6 and 22".to_owned(),
            default => format!("`{default}`"),
        };
        let allowed = setting.allowed();
        let allowed = allowed.strip_prefix("a whole number from ").unwrap_or(&allowed);
        let when = if *change == Change::AtStart { " (at start only)" } else { "" };
        format!("| `{name}` | {default} | {allowed} | {meaning}{when} |")
    }

    #[test]
    fn the_documentation_shows_the_table() {
        let read = |path: &str| {
            std::fs::read_to_string(format!("{}/../{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
        };
        let (readme, celery) = (read("README.md"), read("docs/CELERY.md"));
        let missing = TABLE.iter().filter_map(|setting| {
            let is_celery = setting.about().name.starts_with("celery-");
            let (page, row) = (if is_celery { &celery } else { &readme }, row(*setting));
            (!page.lines().any(|line| line == row)).then_some(row)
        });
        let missing: Vec<String> = missing.collect();
        assert!(missing.is_empty(), "missing in the documentation:\n{}", missing.join("\n"));
        let rows = |page: &str| page.lines().filter(|line| line.starts_with("| `")).count();
        assert!(rows(&celery) >= 13 && rows(&readme) >= 30);
    }

    #[test]
    fn every_default_is_allowed_and_shown_as_it_is() {
        for setting in TABLE {
            let default = setting.about().default;
            setting.set(default).unwrap();
            assert_eq!(setting.text(), default, "{}", setting.about().name);
        }
    }

    #[test]
    fn a_bad_value_is_refused_with_its_name_and_what_is_allowed() {
        let refused = |name: &str, value: &str| find(name).unwrap().set(value).unwrap_err();
        assert_eq!(
            refused("max-batch", "0"),
            "florence.max-batch: '0' is not a whole number from 1 to 64"
        );
        assert_eq!(
            refused("precision", "f64"),
            "florence.precision: 'f64' is not f32, int16, int8, bf16 or auto"
        );
        assert_eq!(refused("publish", "maybe"), "florence.publish: 'maybe' is not yes or no");
        for (name, value) in [
            ("max-batch", "abc"),
            ("max-batch", "65"),
            ("max-batch", "-1"),
            ("cpus", "3-1"),
            ("cpus", "x"),
            ("coordinates", "both"),
            ("allow-networks", "nonsense"),
            ("allow-hosts", "a b/c"),
            ("buckets", "http://x"),
            ("cpus", "1023"),
            ("cpus", "0-1023"),
            ("decimals", "10"),
            ("paused", "1"),
            ("thumbnails", "1025"),
            ("token-ids", "both"),
            ("ended-jobs", "-1"),
            ("prompts", "all"),
            ("prompts", ""),
            ("ca-file", "/nowhere/ca.pem"),
            ("models", "/no/name"),
            ("models", "a=/b a=/c"),
            ("model-roots", "relative/path"),
            ("file-roots", "relative/path"),
            ("file-roots", "/nowhere/to/be/found"),
            ("file-roots", "/ /dev/null"),
            ("image-formats", ""),
            ("image-formats", "bmpp"),
            ("celery-queues", "nocolon"),
            ("celery-priority-steps", "0 10"),
            ("celery-arguments", "url task_prompt"),
        ] {
            let problem = refused(name, value);
            let start = format!("florence.{name}: '{value}' is not ");
            assert!(problem.starts_with(&start), "{problem}");
        }
    }

    #[test]
    fn sizes_may_have_units() {
        let about = |name| About { name, default: "1", change: Change::AnyTime, meaning: "" };
        let (size, count) =
            (Number::new(about("size-bytes"), 1, 1 << 30), Number::new(about("count"), 1, 9999));
        size.set("16mb").unwrap();
        assert_eq!((size.get(), size.text()), (16 << 20, "16777216".to_owned()));
        assert!(size.set("2gb").is_err() && size.set("x").is_err() && count.set("1k").is_err());
    }
}
