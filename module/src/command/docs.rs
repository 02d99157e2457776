//! What each command takes and does: `COMMAND DOCS`, and `FLORENCE.HELP` by the same table.

use redis_module::{Context, RedisResult, RedisValue};

use super::args::Args;
use crate::server::{self, Arg, ArgKind, CommandInfo, KeyBegin, KeySpec, reply::bulk};

const KEY: Arg = Arg::new(c"key", ArgKind::Key(0));
const COUNT: Arg = integer(c"n");

const fn text(name: &'static std::ffi::CStr) -> Arg {
    Arg::new(name, ArgKind::Text)
}

const fn integer(name: &'static std::ffi::CStr) -> Arg {
    Arg::new(name, ArgKind::Integer)
}

const fn decimal(name: &'static std::ffi::CStr) -> Arg {
    Arg::new(name, ArgKind::Decimal)
}

/// A word that stands for itself.
const fn word(word: &'static std::ffi::CStr) -> Arg {
    Arg::new(word, ArgKind::Word).after(word)
}

const IMAGE: Arg = Arg::new(
    c"image",
    ArgKind::OneOf(&[
        text(c"uri"),
        text(c"bytes").after(c"DATA"),
        Arg::new(c"key", ArgKind::Key(1)).after(c"KEY"),
    ]),
);

const QUESTION: Arg = Arg::new(
    c"question",
    ArgKind::OneOf(&[
        text(c"prompt"),
        Arg::new(c"prompts", ArgKind::Block(&[COUNT, text(c"prompt").several()])).after(c"PROMPTS"),
    ]),
);

const CHANGE_OF_MODELS: Arg = Arg::new(
    c"change",
    ArgKind::OneOf(&[
        Arg::new(
            c"load",
            ArgKind::Block(&[
                text(c"name"),
                text(c"directory"),
                text(c"precision").after(c"PRECISION").optional(),
                text(c"adapter").after(c"ADAPTER").optional(),
            ]),
        )
        .after(c"LOAD"),
        text(c"name").after(c"UNLOAD"),
        text(c"name").after(c"DEFAULT"),
    ]),
);

const fn info(
    name: &'static str,
    arity: i32,
    complexity: &'static str,
    summary: &'static str,
) -> CommandInfo {
    CommandInfo { name, summary, complexity, arity, categories: "", keys: &[], args: &[] }
}

/// The argument at a position.
const fn key_at(position: i32, flags: u32) -> KeySpec {
    KeySpec { begin: KeyBegin::Position(position), last: 0, flags }
}

/// The argument after a word.
const fn key_after(word: &'static std::ffi::CStr, flags: u32) -> KeySpec {
    KeySpec { begin: KeyBegin::After(word), last: 0, flags }
}

const INFOS: [CommandInfo; 12] = [
    CommandInfo {
        categories: "write slow",
        keys: &[
            key_at(1, KeySpec::WRITE),
            key_after(c"KEY", KeySpec::READ),
            key_after(c"TOKENS", KeySpec::ADD),
        ],
        args: &[
            KEY,
            IMAGE,
            QUESTION,
            Arg::new(
                c"step",
                ArgKind::OneOf(&[
                    text(c"prompt").after(c"THEN"),
                    text(c"prompt").after(c"EACH"),
                    text(c"prompt").after(c"CROP"),
                ]),
            )
            .several()
            .optional(),
            integer(c"percent").after(c"MARGIN").optional(),
            COUNT.after(c"PRIORITY").optional(),
            integer(c"ms").after(c"DELAY").optional(),
            integer(c"ms").after(c"EXPIRES").optional(),
            integer(c"ms").after(c"TIMEOUT").optional(),
            COUNT.after(c"RETRIES").optional(),
            integer(c"s").after(c"TTL").optional(),
            COUNT.after(c"BEAMS").optional(),
            COUNT.after(c"NBEST").optional(),
            COUNT.after(c"MAXTOKENS").optional(),
            COUNT.after(c"NGRAM").optional(),
            decimal(c"x").after(c"LENGTHPENALTY").optional(),
            decimal(c"t").after(c"TEMPERATURE").optional(),
            integer(c"k").after(c"TOPK").optional(),
            decimal(c"p").after(c"TOPP").optional(),
            integer(c"seed").after(c"SEED").optional(),
            text(c"name").after(c"MODEL").optional(),
            Arg::new(c"exif", ArgKind::OneOf(&[word(c"EXIF"), word(c"NOEXIF")])).optional(),
            word(c"NOCACHE").optional(),
            integer(c"px").after(c"THUMBNAIL").optional(),
            Arg::new(c"streamkey", ArgKind::Key(2)).after(c"TOKENS").optional(),
        ],
        ..info(
            "florence.submit",
            -4,
            "O(1)",
            "Creates a job that asks Florence-2 about a picture; replies its key.",
        )
    },
    CommandInfo {
        categories: "read fast",
        keys: &[key_at(1, KeySpec::READ)],
        args: &[KEY, word(c"RESULT").optional()],
        ..info("florence.get", -2, "O(1)", "A job as a map, or with RESULT only its answer's JSON.")
    },
    CommandInfo {
        categories: "read slow blocking",
        keys: &[KeySpec { last: -2, ..key_at(1, KeySpec::READ) }],
        args: &[KEY.several(), Arg::new(c"timeout", ArgKind::Decimal)],
        ..info(
            "florence.wait",
            -3,
            "O(N) with N keys",
            "Waits for the first of several jobs to end; replies that job as a map.",
        )
    },
    CommandInfo {
        categories: "write fast",
        keys: &[KeySpec { last: -1, ..key_at(1, KeySpec::CHANGE) }],
        args: &[KEY.several()],
        ..info("florence.cancel", -2, "O(N) with N keys", "Cancels jobs that have not ended.")
    },
    CommandInfo {
        categories: "write slow",
        keys: &[KeySpec { last: -1, ..key_at(1, KeySpec::CHANGE) }],
        args: &[KEY.several()],
        ..info(
            "florence.retry",
            -2,
            "O(N) with N keys",
            "Queues jobs again that failed, expired or were cancelled.",
        )
    },
    CommandInfo {
        categories: "read slow",
        args: &[text(c"state").after(c"STATE").optional(), COUNT.after(c"COUNT").optional()],
        ..info("florence.jobs", -1, "O(N) with N jobs", "Lists unfinished jobs, or ended ones.")
    },
    CommandInfo {
        categories: "read fast",
        args: &[Arg::new(c"part", ArgKind::OneOf(&[word(c"LATENCY"), word(c"JOBS")])).optional()],
        ..info("florence.stats", -1, "O(1)", "Figures of the module.")
    },
    CommandInfo {
        categories: "slow admin dangerous",
        ..info("florence.hosts", 1, "O(N) with N hosts", "Downloads by host, the busiest first.")
    },
    CommandInfo {
        categories: "read fast",
        args: &[Arg { is_optional: true, ..CHANGE_OF_MODELS }],
        ..info(
            "florence.model",
            -1,
            "O(1)",
            "Which models there are, and whether they are ready; loads, unloads and chooses them.",
        )
    },
    CommandInfo {
        categories: "slow admin dangerous",
        args: &[CHANGE_OF_MODELS],
        ..info(
            "florence.model.change",
            -3,
            "O(1)",
            "Loads, unloads and chooses models, as FLORENCE.MODEL does for who may run this.",
        )
    },
    CommandInfo {
        categories: "read fast",
        ..info("florence.help", 1, "O(1)", "The commands in short.")
    },
    CommandInfo {
        categories: "fast pubsub",
        args: &[text(c"channel"), text(c"message")],
        ..info(
            "florence.control",
            3,
            "O(N) with N unfinished tasks",
            "What PUBLISH to Celery's channel of remote control becomes.",
        )
    },
];

/// Tells the server what COMMAND DOCS shows.
pub(crate) fn describe(ctx: &Context) -> Result<(), String> {
    INFOS.iter().try_for_each(|info| server::describe(ctx, info))
}

/// `FLORENCE.HELP`
pub(super) fn help(_ctx: &Context, args: &mut Args) -> RedisResult {
    const ABOUT: [&str; 3] = [
        "key of SUBMIT: * lets the server choose. uri: an http(s), gs, s3 or data URL, or an absolute",
        "path or file:// URL below florence.file-roots. prompt: <CAPTION>, <OD>, ... state: queued,",
        "fetching, running, retrying, done, failed, cancelled, expired, or ended.",
    ];
    args.finish()?;
    // Nobody calls CONTROL.
    let commands = INFOS.iter().filter(|info| info.name != "florence.control");
    let lines = commands.flat_map(|info| lines(&synopsis(info)));
    Ok(RedisValue::Array(lines.chain(ABOUT.map(str::to_owned)).map(bulk).collect()))
}

/// A command as it is called: `FLORENCE.GET key [RESULT]`.
fn synopsis(info: &CommandInfo) -> String {
    let args = info.args.iter().map(shown);
    [info.name.to_uppercase()].into_iter().chain(args).collect::<Vec<_>>().join(" ")
}

fn shown(arg: &Arg) -> String {
    let all = |args: &[Arg], between| args.iter().map(shown).collect::<Vec<_>>().join(between);
    let name = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    let value = match arg.kind {
        ArgKind::Word => None,
        ArgKind::OneOf(args) => Some(all(args, "|")),
        ArgKind::Block(args) => Some(all(args, " ")),
        _ => Some(name(arg.name)),
    };
    let one = arg.token.map(name).into_iter().chain(value).collect::<Vec<_>>().join(" ");
    let text = if arg.is_several { format!("{one} [{one} ...]") } else { one };
    if arg.is_optional { format!("[{text}]") } else { text }
}

/// Lines of a synopsis; those that go on are indented.
fn lines(synopsis: &str) -> Vec<String> {
    const WIDTH: usize = 100;
    let mut lines = vec![String::new()];
    for (i, part) in synopsis.split(" [").enumerate() {
        let part = if i == 0 { part.to_owned() } else { format!("[{part}") };
        match lines.last_mut() {
            Some(line) if line.is_empty() => *line = part,
            Some(line) if line.len() + 1 + part.len() <= WIDTH => line.extend([" ", &part]),
            _ => lines.push(format!("    {part}")),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_synopsis_has_a_few_lines_and_all_arguments() {
        let of = |name| synopsis(INFOS.iter().find(|info| info.name == name).unwrap());
        assert_eq!(of("florence.help"), "FLORENCE.HELP");
        assert_eq!(of("florence.wait"), "FLORENCE.WAIT key [key ...] timeout");
        assert_eq!(of("florence.jobs"), "FLORENCE.JOBS [STATE state] [COUNT n]");
        let submit = of("florence.submit");
        let start = "FLORENCE.SUBMIT key uri|DATA bytes|KEY key prompt|PROMPTS n prompt [prompt ...] \
                     [THEN prompt|EACH prompt|CROP prompt";
        assert!(
            submit.starts_with(start) && submit.contains("[EXIF|NOEXIF] [NOCACHE]"),
            "{submit}"
        );
        let lines = lines(&submit);
        assert!(lines.len() > 1 && lines.iter().all(|line| line.len() <= 104), "{lines:#?}");
        assert_eq!(lines.join(" ").replace("     ", " "), submit);
    }
}
