//! `florence pull`: downloads a checkpoint from the Hugging Face hub.
//!
//! `HF_ENDPOINT` names another hub, `HF_TOKEN` is sent to it (and not to where it redirects).
//! A file is written as `NAME.part`, continued there after an interruption, checked against the
//! hub's SHA-256 or size, and only then renamed.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use sha2::{Digest, Sha256};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Repository, such as microsoft/Florence-2-base-ft
    repo: String,
    /// Directory to write to (default: the repository's name)
    #[arg(long)]
    to: Option<PathBuf>,
    /// Branch, tag or commit
    #[arg(long, default_value = "main")]
    revision: String,
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

const NEEDED: [&str; 3] = ["config.json", "preprocessor_config.json", "tokenizer.json"];
const OPTIONAL: [&str; 2] = ["generation_config.json", "LICENSE"];

struct Hub {
    agent: ureq::Agent,
    endpoint: String,
    token: Option<String>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let hub = Hub {
        agent: ureq::Agent::config_builder().http_status_as_error(false).build().into(),
        endpoint: std::env::var("HF_ENDPOINT")
            .unwrap_or_else(|_| "https://huggingface.co".to_owned()),
        token: std::env::var("HF_TOKEN").ok(),
    };
    let name = args.repo.rsplit('/').next().unwrap_or(&args.repo);
    let directory = args.to.clone().unwrap_or_else(|| PathBuf::from(name));
    let url =
        format!("{}/api/models/{}/revision/{}?blobs=true", hub.endpoint, args.repo, args.revision);
    let mut response = hub.get(&url, 0)?;
    ensure!(response.status() == 200, "the hub answers {} for {}", response.status(), args.repo);
    let revision: Revision = serde_json::from_reader(response.body_mut().as_reader())
        .context("the hub's list of files cannot be read")?;
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    for file in wanted(&revision.siblings)? {
        let url =
            format!("{}/{}/resolve/{}/{}", hub.endpoint, args.repo, revision.sha, file.rfilename);
        hub.download(&url, file, &directory)?;
    }
    println!("{} at {} is in {}", args.repo, revision.sha, directory.display());
    Ok(())
}

/// The files that a checkpoint consists of; safetensors are preferred to a pickle.
fn wanted(files: &[Sibling]) -> anyhow::Result<Vec<&Sibling>> {
    let find = |name: &str| files.iter().find(|file| file.rfilename == name);
    let mut wanted = Vec::new();
    for name in NEEDED {
        wanted.push(find(name).with_context(|| format!("the repository has no {name}"))?);
    }
    wanted.extend(OPTIONAL.iter().filter_map(|name| find(name)));
    if let Some(index) = find("model.safetensors.index.json") {
        wanted.push(index);
        let is_shard = |file: &&Sibling| {
            file.rfilename.starts_with("model-") && file.rfilename.ends_with(".safetensors")
        };
        wanted.extend(files.iter().filter(is_shard));
    } else if let Some(weights) = find("model.safetensors").or_else(|| find("pytorch_model.bin")) {
        wanted.push(weights);
    } else {
        bail!("the repository has neither model.safetensors nor pytorch_model.bin");
    }
    Ok(wanted)
}

impl Hub {
    /// Asks for a URL, from byte `from` on.
    fn get(&self, url: &str, from: u64) -> anyhow::Result<ureq::http::Response<ureq::Body>> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        Ok(request.call()?)
    }

    fn download(&self, url: &str, file: &Sibling, directory: &Path) -> anyhow::Result<()> {
        let name = file.rfilename.as_str();
        let (target, part) = (directory.join(name), directory.join(format!("{name}.part")));
        if target.exists() && check(&target, file).is_ok() {
            println!("{name} is there");
            return Ok(());
        }
        let have = part.metadata().map_or(0, |metadata| metadata.len());
        let mut response = self.get(url, have)?;
        let is_resumed = match response.status().as_u16() {
            206 => true,
            200 => false,
            // All of it is there already, or more than the hub has: the check below tells.
            416 => return finish(&part, &target, file),
            status => bail!("the hub answers {status} for {name}"),
        };
        let mut out = OpenOptions::new()
            .create(true)
            .write(true)
            .append(is_resumed)
            .truncate(!is_resumed)
            .open(&part)
            .with_context(|| format!("cannot write {}", part.display()))?;
        let bar = progress_bar(name, size_of(file));
        bar.set_position(if is_resumed { have } else { 0 });
        let mut body = bar.wrap_read(response.body_mut().as_reader());
        std::io::copy(&mut body, &mut out).with_context(|| {
            format!("the download of {name} broke off; run the command again to continue it")
        })?;
        out.flush()?;
        bar.finish();
        finish(&part, &target, file)
    }
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
