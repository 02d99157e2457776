//! `florence pull`: downloads a checkpoint or an adapter from the Hugging Face hub.
//!
//! `HF_ENDPOINT` names another hub, `HF_TOKEN` is sent to it (and not to where it redirects).
//! A file is written as `NAME.part`, continued there after an interruption, checked against the
//! hub's SHA-256 or size, and only then renamed. A download that breaks off or stalls is continued
//! at once, as long as it gets on.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use florence_engine::{
    fetch::{Authorities, Client, FetchError, FetchLimits, Pace, Response, receive},
    model::StandIn,
};
use indicatif::{ProgressBar, ProgressStyle};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// What a part of an address must not have as it is.
const PART: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
const PATH: &AsciiSet = &PART.remove(b'/');

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Repository of the hub, such as microsoft/Florence-2-base-ft
    #[arg(value_name = "MODEL")]
    repo: Option<String>,
    /// Directory to write to (default: the repository's name)
    #[arg(long)]
    to: Option<PathBuf>,
    /// Branch, tag or commit
    #[arg(long, default_value = "main")]
    revision: String,
    /// File of certificates in PEM, of authorities that are trusted besides the system's
    #[arg(long, value_name = "FILE", default_value = "")]
    ca_file: Authorities,
}

/// What the hub tells of a revision.
#[derive(Deserialize)]
struct Revision {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

const TOKENIZER: &str = "tokenizer.json";
const ADAPTER: &str = "adapter_config.json";
const PREPROCESSOR: &str = "preprocessor_config.json";
/// What is taken where it is there.
const OPTIONAL: [&str; 4] = [TOKENIZER, PREPROCESSOR, "generation_config.json", "LICENSE"];

struct Hub {
    client: Client,
    endpoint: String,
    token: Option<String>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let Some(repo) = &args.repo else {
        bail!("which model? For example: florence pull microsoft/Florence-2-base-ft");
    };
    let parts: Vec<&str> = repo.split('/').collect();
    let is_name = |part: &&str| !part.is_empty() && !part.starts_with('.');
    let is_repo = parts.len() <= 2 && parts.iter().all(is_name);
    ensure!(is_repo, "{repo} is no repository: they are called OWNER/NAME");
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let endpoint = set("HF_ENDPOINT");
    let hub = Hub {
        client: Client::new(&args.ca_file),
        endpoint: endpoint
            .map_or("https://huggingface.co".to_owned(), |it| it.trim_end_matches('/').to_owned()),
        token: set("HF_TOKEN"),
    };
    let name = repo.rsplit('/').next().unwrap_or(repo);
    let directory = args.to.clone().unwrap_or_else(|| PathBuf::from(name));
    let revision = hub.revision(repo, &args.revision)?;
    let wanted = wanted(&revision.siblings)?;
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    for file in &wanted {
        let name = utf8_percent_encode(&file.rfilename, PATH);
        let url = format!("{}/{repo}/resolve/{}/{name}", hub.endpoint, revision.sha);
        hub.download(&url, file, &directory)?;
    }
    tellln!("{repo} at {} is in {}", revision.sha, directory.display());
    tell_what_is_missing(&wanted, &directory);
    Ok(())
}

/// What the model needs from elsewhere.
fn tell_what_is_missing(pulled: &[&Sibling], directory: &Path) {
    let has = |name: &str| pulled.iter().any(|file| file.rfilename == name);
    if has(ADAPTER) {
        tellln!(
            "it is an adapter: give --adapter {}, and with --model the directory of the model that \
             it was trained on",
            directory.display()
        );
        return;
    }
    if !has(TOKENIZER) {
        tellln!(
            "it has no {TOKENIZER}: --tokenizer, or florence.tokenizer, names a directory that has \
             one, such as that of the model that it was made from"
        );
    }
    if !has(PREPROCESSOR) {
        tellln!(
            "it has no {PREPROCESSOR}: that of the tokenizer's directory is taken, else Florence-2's \
             own (768 pixels)"
        );
    }
}

/// The files that a checkpoint or an adapter consists of; safetensors are preferred to a pickle, and
/// a checkpoint to an adapter that lies beside it.
fn wanted(files: &[Sibling]) -> anyhow::Result<Vec<&Sibling>> {
    let find = |name: &str| files.iter().find(|file| file.rfilename == name);
    let mut wanted: Vec<&Sibling> = OPTIONAL.iter().filter_map(|name| find(name)).collect();
    if let Some(index) = find("model.safetensors.index.json") {
        wanted.push(index);
        let is_shard = |file: &&Sibling| {
            file.rfilename.starts_with("model-") && file.rfilename.ends_with(".safetensors")
        };
        wanted.extend(files.iter().filter(is_shard));
    } else if let Some(weights) = find("model.safetensors").or_else(|| find("pytorch_model.bin")) {
        wanted.push(weights);
    } else if let Some(config) = find(ADAPTER) {
        let weights = find("adapter_model.safetensors").or_else(|| find("adapter_model.bin"));
        let no_weights = "the repository has an adapter_config.json, but neither \
                          adapter_model.safetensors nor adapter_model.bin";
        wanted.extend([config, weights.context(no_weights)?]);
        return Ok(wanted);
    } else {
        bail!(
            "the repository has neither weights (model.safetensors, pytorch_model.bin) nor an \
             adapter ({ADAPTER})"
        );
    }
    let config = find("config.json").context("the repository has weights, but no config.json")?;
    // What is small comes first.
    wanted.insert(0, config);
    Ok(wanted)
}

/// Why a file is not there yet.
enum Problem {
    /// It may come with the next request.
    ForNow(FetchError),
    ForGood(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Problem {
    fn from(error: E) -> Self {
        Self::ForGood(error.into())
    }
}

impl Hub {
    /// Finds out what a revision consists of.
    fn revision(&self, repo: &str, revision: &str) -> anyhow::Result<Revision> {
        const MOST: u64 = 64 << 20;
        let revision = utf8_percent_encode(revision, PART);
        let url = format!("{}/api/models/{repo}/revision/{revision}?blobs=true", self.endpoint);
        let mut response = self.get(&url, 0).with_context(|| {
            let host = self.host();
            format!(
                "{host} cannot be asked; where there is no way to it, name a mirror in HF_ENDPOINT, \
                 or copy the checkpoint's files from another machine into a directory"
            )
        })?;
        let status = response.status();
        ensure!(
            !matches!(status.as_u16(), 401 | 403),
            "the hub answers {status} for {repo} (OWNER/NAME): it is not there, or only for those \
             whose access token is in HF_TOKEN"
        );
        ensure!(status == 200, "the hub answers {status} for {repo} (OWNER/NAME) at {revision}");
        let mut bytes = Vec::new();
        response.body_mut().as_reader().take(MOST).read_to_end(&mut bytes)?;
        if let Some(found) = StandIn::of(&bytes) {
            bail!("the list of files is {found}: {} gave it", self.host());
        }
        serde_json::from_slice(&bytes).context("the hub's list of files cannot be read")
    }

    /// The hub's host, without what else is in its URL.
    fn host(&self) -> String {
        let url = url::Url::parse(&self.endpoint).ok();
        let host = url.as_ref().and_then(|url| Some((url.host_str()?.to_owned(), url.port())));
        match host {
            Some((host, Some(port))) => format!("{host}:{port}"),
            Some((host, None)) => host,
            None => "HF_ENDPOINT, which is no URL,".to_owned(),
        }
    }

    /// Asks for a URL, from byte `from` on.
    fn get(&self, url: &str, from: u64) -> Result<Response, FetchError> {
        let mut headers = Vec::new();
        let bearer = self.token.as_ref().map(|token| format!("Bearer {token}"));
        headers.extend(bearer.as_deref().map(|bearer| ("Authorization", bearer)));
        let range = (from > 0).then(|| format!("bytes={from}-"));
        headers.extend(range.as_deref().map(|range| ("Range", range)));
        self.client.get(url, &headers)
    }

    fn download(&self, url: &str, file: &Sibling, directory: &Path) -> anyhow::Result<()> {
        /// Requests without a byte, one after the other.
        const MOST_IN_VAIN: u32 = 5;
        let name = file.rfilename.as_str();
        let (target, part) = (directory.join(name), directory.join(format!("{name}.part")));
        if target.exists() && check(&target, file).is_ok() {
            tellln!("{name} is there");
            return Ok(());
        }
        let mut in_vain = 0;
        loop {
            let before = length(&part);
            match self.go_on(url, file, &part) {
                Ok(()) => return finish(&part, &target, file),
                Err(Problem::ForGood(error)) => return Err(error),
                Err(Problem::ForNow(error)) => {
                    in_vain = if length(&part) > before { 0 } else { in_vain + 1 };
                    if in_vain == MOST_IN_VAIN {
                        let host = self.host();
                        let context =
                            format!("{host} does not give {name}; run the command again to go on");
                        return Err(anyhow::Error::from(error).context(context));
                    }
                    tellln!("{name}: {error}; going on from byte {}", length(&part));
                    thread::sleep(Duration::from_secs(1) * in_vain);
                }
            }
        }
    }

    /// Appends what is missing of a file, as far as it comes.
    fn go_on(&self, url: &str, file: &Sibling, part: &Path) -> Result<(), Problem> {
        /// So often a new average begins: a fast start must not make up for a stall.
        const WINDOW: Duration = Duration::from_secs(30);
        let (name, mut have) = (&file.rfilename, length(part));
        let mut response = self.get(url, have).map_err(Problem::ForNow)?;
        if response.status() == 206 && !begins_at(&response, have) {
            // It would be appended where it does not belong.
            have = 0;
            response = self.get(url, have).map_err(Problem::ForNow)?;
        }
        let is_resumed = match response.status().as_u16() {
            206 if have > 0 => true,
            200 => false,
            // All of it is there already, or more than the hub has: the check tells.
            416 => return Ok(()),
            status => {
                let error = FetchError::Status(status);
                if error.is_transient() {
                    return Err(Problem::ForNow(error));
                }
                return Err(anyhow::anyhow!("the hub answers {status} for {name}").into());
            }
        };
        let mut out = OpenOptions::new()
            .create(true)
            .write(true)
            .append(is_resumed)
            .truncate(!is_resumed)
            .open(part)
            .with_context(|| format!("cannot write {}", part.display()))?;
        let bar = progress_bar(name, size_of(file));
        bar.set_position(if is_resumed { have } else { 0 });
        let mut body = response.body_mut().as_reader();
        let mut chunk = vec![0; 64 << 10];
        let new_pace = || (Pace::new(FetchLimits::default().speed), Instant::now());
        let (mut pace, mut since) = new_pace();
        loop {
            let count = receive(&mut body, &mut chunk).map_err(Problem::ForNow)?;
            if count == 0 {
                break;
            }
            out.write_all(&chunk[..count])?;
            bar.inc(count as u64);
            if pace.is_too_slow(count) {
                return Err(Problem::ForNow(FetchError::TooSlow));
            }
            if since.elapsed() > WINDOW {
                (pace, since) = new_pace();
            }
        }
        bar.finish();
        Ok(())
    }
}

/// Whether a part of a file says that it is the one from this byte on.
fn begins_at(response: &Response, from: u64) -> bool {
    let range = response.headers().get("Content-Range").and_then(|range| range.to_str().ok());
    let first = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next());
    first.is_some_and(|first| first.parse() == Ok(from))
}

/// How much of a file is there.
fn length(path: &Path) -> u64 {
    path.metadata().map_or(0, |metadata| metadata.len())
}

fn size_of(file: &Sibling) -> Option<u64> {
    file.lfs.as_ref().map(|lfs| lfs.size).or(file.size)
}

/// Checks a complete download and gives it its name; a wrong one is removed.
fn finish(part: &Path, target: &Path, file: &Sibling) -> anyhow::Result<()> {
    if let Err(error) = check(part, file) {
        std::fs::remove_file(part)?;
        return Err(error);
    }
    std::fs::rename(part, target)?;
    Ok(())
}

fn check(path: &Path, file: &Sibling) -> anyhow::Result<()> {
    let name = &file.rfilename;
    let mut start = Vec::new();
    File::open(path)?.take(StandIn::START as u64).read_to_end(&mut start)?;
    if let Some(found) = StandIn::of(&start) {
        bail!("{name} is {found}");
    }
    if let Some(expected) = size_of(file) {
        let size = path.metadata()?.len();
        ensure!(size == expected, "{name} has {size} bytes, the hub says {expected}");
    }
    if let Some(lfs) = &file.lfs {
        let mut digest = Sha256::new();
        let mut reader = File::open(path)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = reader.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            digest.update(&buffer[..n]);
        }
        let found = format!("{:x}", digest.finalize());
        ensure!(found == lfs.sha256, "{name} has SHA-256 {found}, the hub says {}", lfs.sha256);
    }
    Ok(())
}

fn progress_bar(name: &str, size: Option<u64>) -> ProgressBar {
    let style = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style =
        ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(size.unwrap_or_default()).with_style(style).with_message(name.to_owned())
}
