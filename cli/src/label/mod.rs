//! `florence label`: answers about any number of pictures, a JSON object a line.
//!
//! - `select`: which of the pictures are meant
//! - `flow`: a picture's way from the list to its answers
//! - `repeated`: what was asked already about the same bytes
//! - `local`, `remote`: who answers, the engine here or servers
//! - `record`, `journal`: the output, which a later run goes on with
//! - `progress`: how far it is

mod flow;
mod journal;
mod local;
mod progress;
mod record;
mod remote;
mod repeated;
mod select;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU64},
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use florence_engine::{Florence, Stop, fetch::Authorities, prompt::Prompt};
use xxhash_rust::xxh3::xxh3_128;

use crate::{
    ask::AskArgs,
    formats::{self, FormatArgs, Line},
    limits::within,
    load::ModelArgs,
    servers, signals,
    source::Sources,
};
use flow::{Flow, Permits, Todo};
use journal::{Before, Journal, Mark};
use local::Local;
use progress::{Counts, Progress};
use record::{Errors, Recorder};
use remote::Remote;
use repeated::{Asked, Repeated};
use select::SelectArgs;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folders, globs, lists of names (.txt), tables (.csv, .tsv, .jsonl), archives (.tar),
    /// pictures, URLs, s3:// and gs:// prefixes; - for names or URLs on stdin, one a line
    #[arg(required = true, value_name = "SOURCE")]
    sources: Vec<String>,
    /// Task token, such as `<OD>`, followed by its text where the task takes one; may be repeated
    #[arg(long = "task", required = true, value_name = "PROMPT")]
    tasks: Vec<String>,
    /// The JSON Lines to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// What has no answer, and why (default: errors.jsonl beside the output)
    #[arg(long, value_name = "FILE")]
    errors: Option<PathBuf>,
    /// Go on with the output of an earlier run
    #[arg(long)]
    resume: bool,
    /// Begin the output anew, unless it is resumed; write formats over files that are there
    #[arg(long)]
    overwrite: bool,
    /// Write files of N lines, OUT-00000.jsonl and so on, which have their names once they are whole
    #[arg(long, value_name = "N", value_parser = within::<usize>(1..=usize::MAX))]
    shard: Option<usize>,
    /// The column of tables that names the pictures
    #[arg(long, value_name = "NAME")]
    column: Option<String>,
    #[command(flatten)]
    select: SelectArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    ask: AskArgs,
    /// Most pictures that are decoded together (default: 16)
    #[arg(long, value_name = "N", value_parser = within::<usize>(1..=1024))]
    batch: Option<usize>,
    /// Batches that are answered at once, each with its share of the threads (default: one for each
    /// thread, at most 4; on a GPU 1)
    #[arg(long, value_name = "N", value_parser = within::<usize>(1..=64))]
    engines: Option<usize>,
    /// Pictures that are read, downloaded and decoded at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = within::<usize>(1..=1024))]
    readers: usize,
    /// Let this server answer instead (default: the one that `FLORENCE_REDIS` names, unless a model or
    /// how it is loaded is given)
    #[arg(
        long,
        value_name = "URL",
        conflicts_with_all = ["FilesArgs", "ModelArgs", "engines", "batch"]
    )]
    redis: Option<String>,
    /// How long a server that does not answer is waited for
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = within::<u64>(0..=86_400))]
    patience: u64,
    /// File of certificates in PEM, of authorities that are trusted besides the system's
    #[arg(long, value_name = "FILE", default_value = "")]
    ca_file: Authorities,
    #[command(flatten)]
    formats: FormatArgs,
}

/// Who answers.
enum Answerer {
    Local(Box<Local>),
    Remote(Box<Remote>),
}

impl Answerer {
    fn new(args: &Args) -> anyhow::Result<Self> {
        if let Some(url) = server(args)? {
            let patience = Duration::from_secs(args.patience);
            return Ok(Self::Remote(Box::new(Remote::new(
                &url,
                patience,
                &args.tasks,
                &args.ask,
            )?)));
        }
        let engines = args.model.load_several(args.engines)?;
        if let Some(note) = engines.first().and_then(Florence::note) {
            eprintln!("{note} --to DIRECTORY, then --model DIRECTORY");
        }
        Ok(Self::Local(Box::new(Local::new(
            engines,
            &args.tasks,
            &args.ask,
            args.batch.unwrap_or(16),
        )?)))
    }

    fn model(&self) -> &str {
        match self {
            Self::Local(local) => local.model(),
            Self::Remote(remote) => remote.model(),
        }
    }

    fn most(&self, readers: usize) -> usize {
        match self {
            Self::Local(local) => local.most(readers),
            Self::Remote(_) => Remote::most(readers),
        }
    }

    fn run(&self, flow: &Flow<'_>, readers: usize) {
        match self {
            Self::Local(local) => local.run(flow, readers),
            Self::Remote(remote) => remote.run(flow, readers),
        }
    }
}

/// The server that answers, if one does.
fn server(args: &Args) -> anyhow::Result<Option<String>> {
    let is_here = args.engines.is_some() || args.batch.is_some() || !args.model.is_as_usual();
    if args.redis.is_some() || is_here {
        return Ok(args.redis.clone());
    }
    let named = servers::in_environment()?;
    if named.is_some() {
        eprintln!("the server of FLORENCE_REDIS answers");
    }
    Ok(named)
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    check(args)?;
    let errors = args.errors.clone().unwrap_or_else(|| args.out.with_file_name("errors.jsonl"));
    check_files(args, &errors)?;
    let sources = Arc::new(Sources::new(&args.sources, args.column.as_deref(), &args.ca_file)?);
    let answerer = Answerer::new(args)?;
    let (journal, done, repeated) = open(args, answerer.model())?;
    let (progress, stop) = (Arc::new(Progress::new()), Stop::default());
    signals::end_at(&stop)?;
    let turned = AtomicU64::new(0);
    let (todo, ends) = (list(args, &sources, &progress, done), unbounded());
    let flow = Flow {
        sources: &sources,
        todo,
        permits: Permits::new(answerer.most(args.readers)),
        repeated: &repeated,
        stop: &stop,
        ends: ends.0,
        leaves_addresses: matches!(answerer, Answerer::Remote(_)),
        // Readers of formats turn pictures themselves.
        turned: (!args.formats.is_empty() && !args.ask.exif).then_some(&turned),
    };
    let mut recorder = Recorder {
        journal,
        errors: Errors::new(&errors, &args.out)?,
        prompts: &args.tasks,
        repeated: &repeated,
        progress: &progress,
        ended: &|job| {
            if let Answerer::Remote(remote) = &answerer {
                remote.ended(job);
            }
        },
    };
    let recorded = thread::scope(|scope| {
        // It goes when the last picture has come to its end.
        let (answerer, readers) = (&answerer, args.readers);
        scope.spawn(move || answerer.run(&flow, readers));
        let mut recorded = Ok(());
        for end in ends.1 {
            if recorded.is_ok() {
                recorded = recorder.take(end);
                if recorded.is_err() {
                    stop.stop();
                }
            }
        }
        recorded
    });
    if let Answerer::Remote(remote) = &answerer {
        remote.tidy();
    }
    progress.finish();
    let counts = progress.counts();
    recorded.with_context(|| go_on(&args.out, counts))?;
    if stop.is_stopped() {
        bail!(go_on(&args.out, counts));
    }
    recorder.journal.finish()?;
    let files = Journal::files(&args.out, args.shard)?;
    let written = formats::write(&files, &args.out, &args.formats, args.overwrite, &stop);
    told(args, counts, progress.rate());
    if let count @ 1.. = turned.into_inner() {
        eprintln!(
            "{count} pictures have an EXIF tag that turns them, as readers of these formats do, and \
             were labelled as they are stored: give --exif"
        );
    }
    written?;
    let all = counts.skipped + counts.answered + counts.failed;
    match counts.failed {
        0 => Ok(()),
        failed => bail!("{failed} of {all} pictures have no answer: {}", errors.display()),
    }
}

fn check(args: &Args) -> anyhow::Result<()> {
    /// They are bits of a number.
    const MOST_TASKS: usize = 64;
    for (i, task) in args.tasks.iter().enumerate() {
        Prompt::parse(task, args.ask.prompts)?;
        ensure!(!args.tasks[..i].contains(task), "the task {task} is there twice");
    }
    ensure!(args.tasks.len() <= MOST_TASKS, "there are more than {MOST_TASKS} tasks");
    ensure!(args.out != Path::new("-"), "--out takes a file: it is read again");
    args.ask.check()?;
    args.select.check()?;
    args.formats.check()
}

/// Nothing is written twice, and nothing that is read is written.
fn check_files(args: &Args, errors: &Path) -> anyhow::Result<()> {
    let mut taken = HashSet::new();
    let formats: Vec<PathBuf> = args.formats.paths(&args.out).collect();
    for path in [&*args.out, errors].into_iter().chain(formats.iter().map(|it| &**it)) {
        ensure!(taken.insert(formats::place(path)), "{} would be written twice", path.display());
    }
    let files = args.sources.iter().map(Path::new).filter(|source| source.is_file());
    for source in files {
        let is_read = !taken.contains(&formats::place(source));
        ensure!(is_read, "{} would be read and written", source.display());
    }
    // Hours before it would be found out.
    let there = formats.iter().find(|path| path.is_file() && !args.resume && !args.overwrite);
    if let Some(there) = there {
        bail!("{} is there: --overwrite writes over it", there.display());
    }
    Ok(())
}

/// Opens the output, and learns from it what is answered already.
fn open(args: &Args, model: &str) -> anyhow::Result<(Journal, HashSet<u128>, Repeated)> {
    // What is resumed stays, whatever formats may be written over.
    let before = match (args.resume, args.overwrite) {
        (true, _) => Before::Kept,
        (_, true) => Before::Dropped,
        _ => Before::Nothing,
    };
    let (mut done, repeated) = (HashSet::new(), Repeated::default());
    let (mut other, mut group) = (None, Group::default());
    let journal = Journal::open(&args.out, args.shard, before, |mark, line| {
        done.insert(answer_of(&line.file, &line.prompt));
        group.add(&args.tasks, mark, &line, &repeated);
        if line.model != model {
            other = Some(line.model);
        }
    })?;
    group.close(&repeated);
    if let Some(other) = other {
        bail!("{} has answers of the model {other}, not of {model}", args.out.display());
    }
    Ok((journal, done, repeated))
}

/// Tells answers apart.
fn answer_of(file: &str, prompt: &str) -> u128 {
    xxh3_128([file.as_bytes(), &[0], prompt.as_bytes()].concat().as_slice())
}

/// The lines of a picture, one after the other, as they were written together.
#[derive(Default)]
struct Group {
    file: String,
    first: Option<(Asked, Mark)>,
}

impl Group {
    fn add(&mut self, tasks: &[String], mark: Mark, line: &Line, repeated: &Repeated) {
        let bit = tasks.iter().position(|task| *task == line.prompt).map(|i| 1_u64 << i);
        match (&mut self.first, bit) {
            // In the order of the tasks, as they would be written.
            (Some((asked, _)), Some(bit)) if self.file == line.file && bit > asked.prompts => {
                asked.prompts |= bit;
                return;
            }
            _ => self.close(repeated),
        }
        let half =
            line.sha256.as_deref().and_then(|it| u128::from_str_radix(it.get(..32)?, 16).ok());
        self.file.clone_from(&line.file);
        self.first = half.zip(bit).map(|(content, prompts)| (Asked { content, prompts }, mark));
    }

    fn close(&mut self, repeated: &Repeated) {
        if let Some((asked, mark)) = self.first.take() {
            repeated.written(asked, mark);
        }
    }
}

/// Lists what is to be done, in a thread of its own: it may wait for ever, and is left behind then.
fn list(
    args: &Args,
    sources: &Arc<Sources>,
    progress: &Arc<Progress>,
    mut done: HashSet<u128>,
) -> Receiver<Todo> {
    const AHEAD: usize = 256;
    let (sender, todo): (Sender<Todo>, _) = bounded(AHEAD);
    let (select, tasks) = (args.select.clone(), args.tasks.clone());
    let (listed, told) = (Arc::clone(sources), Arc::clone(progress));
    thread::spawn(move || {
        for listed in select.of(listed.list()) {
            // Each is asked once, however often it is listed.
            let is_new = |name: &str, done: &mut HashSet<u128>| {
                let is_new = |(i, task): (usize, &String)| {
                    u64::from(done.insert(answer_of(name, task))) << i
                };
                tasks.iter().enumerate().map(is_new).sum()
            };
            let prompts = listed.as_ref().map_or(0, |item| is_new(&item.name, &mut done));
            if listed.is_ok() && prompts == 0 {
                told.skipped();
            } else if sender.send(Todo { listed, prompts }).is_err() {
                return;
            }
        }
    });
    if sources.can_be_counted() {
        let (select, listed) = (args.select.clone(), Arc::clone(sources));
        let progress = Arc::clone(progress);
        thread::spawn(move || progress.is_of(select.of(listed.list()).count() as u64));
    }
    todo
}

fn go_on(out: &Path, counts: Counts) -> String {
    let there = counts.skipped + counts.answered;
    format!(
        "stopped: {there} pictures are answered in {}; the same command with --resume goes on there",
        out.display()
    )
}

fn told(args: &Args, counts: Counts, rate: f64) {
    let Counts { skipped, answered, repeated, failed } = counts;
    tellln!(
        "{}: {answered} pictures answered ({repeated} copies of others), {skipped} were there, \
         {failed} failed; {rate:.1} a second",
        args.out.display()
    );
}
