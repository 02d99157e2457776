//! Where pictures come from: the arguments of the command as one list of pictures, made as it is
//! asked for.
//!
//! - `files`: folders, globs, files
//! - `lists`: names and addresses by line, or in a column of a table
//! - `tar`: archives, as WebDataset has them
//! - `bucket`: what is in a bucket below a prefix

mod bucket;
mod files;
mod lists;
mod tar;

use std::{
    fmt::Display,
    fs::File,
    io::{self, BufReader, Read as _, Seek as _, SeekFrom},
    iter,
    path::{Component, Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use florence_engine::{
    Stop,
    fetch::{AccessRules, Authorities, FetchError, FetchLimits, Fetcher, file_of_url},
};

/// A picture that is to be labelled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    /// What it is called in the output.
    pub(crate) name: String,
    pub(crate) place: Place,
}

/// Where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    File(PathBuf),
    /// A part of an archive.
    Member {
        archive: Arc<Path>,
        offset: u64,
        size: u64,
    },
    /// `http`, `https`, `s3` or `gs`.
    Address(String),
}

impl Place {
    /// The file that has them, here.
    pub(crate) fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Member { archive, .. } => Some(archive),
            Self::Address(_) => None,
        }
    }
}

/// Something that cannot be listed, and why.
#[derive(Debug)]
pub(crate) struct Unlisted {
    pub(crate) name: String,
    pub(crate) reason: String,
}

impl Unlisted {
    fn new(name: &dyn Display, reason: &dyn Display) -> Self {
        Self { name: name.to_string(), reason: reason.to_string() }
    }
}

pub(crate) type Listed = Result<Item, Unlisted>;
pub(crate) type List<'a> = Box<dyn Iterator<Item = Listed> + Send + 'a>;

const NO_TEXT: &str = "its name is not text in UTF-8, which the output could not tell";

/// Most bytes of a picture.
const MOST_BYTES: u64 = 256 << 20;

const PICTURES: [&str; 8] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"];

fn has_ending(path: &Path) -> bool {
    PICTURES.contains(&&*ending(path))
}

fn is_picture(name: &str) -> bool {
    let is_hidden = name.rsplit('/').next().is_some_and(|name| name.starts_with('.'));
    !is_hidden && has_ending(Path::new(name))
}

fn is_address(name: &str) -> bool {
    let scheme = name.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
    scheme.is_some_and(|scheme| ["http", "https", "s3", "gs"].contains(&scheme.as_str()))
}

/// One argument.
#[derive(Debug)]
enum Source {
    Stdin,
    Address(String),
    Bucket(String),
    Folder(PathBuf),
    File(PathBuf),
    Glob(files::Glob),
}

impl Source {
    fn of(argument: &str) -> anyhow::Result<Self> {
        if argument == "-" {
            return Ok(Self::Stdin);
        }
        if is_address(argument) {
            let is_web = argument.to_ascii_lowercase().starts_with("http");
            return Ok(if is_web { Self::Address } else { Self::Bucket }(argument.to_owned()));
        }
        let path =
            plain(&file_of_url(argument.as_bytes()).unwrap_or_else(|| PathBuf::from(argument)));
        if !path.exists() {
            let glob = files::Glob::of(argument)?;
            return glob.map(Self::Glob).with_context(|| format!("there is no {argument}"));
        }
        if path.is_dir() {
            return Ok(Self::Folder(path));
        }
        ensure!(!is_packed(&path), "{argument}: {PACKED}");
        Ok(Self::File(path))
    }
}

/// A path as most would write it, since pictures are known by their names: separators once, and no
/// `..` behind a folder, unless a link is one of them and it leads elsewhere.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        let is_folder = matches!(plain.components().next_back(), Some(Component::Normal(_)));
        if component == Component::ParentDir && is_folder {
            plain.pop();
        } else {
            plain.push(component);
        }
    }
    if plain.as_os_str().is_empty() {
        plain.push(".");
    }
    let spelled: PathBuf = path.components().collect();
    if plain == spelled {
        return plain;
    }
    let is_same = path.canonicalize().is_ok_and(|it| plain.canonicalize().is_ok_and(|to| to == it));
    if is_same { plain } else { spelled }
}

/// The ending of a name, in small letters.
fn ending(path: &Path) -> String {
    path.extension().map(|it| it.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

const PACKED: &str = "of archives, only .tar without compression is read";

fn is_packed(path: &Path) -> bool {
    ["gz", "tgz", "zst", "zip"].contains(&&*ending(path))
}

/// A file: a picture, or by the ending of its name something that lists pictures.
fn of_file(path: &Path, column: Option<&str>) -> List<'static> {
    match &*ending(path) {
        "tar" => or_none(tar::members(path), &path.display()),
        "csv" | "tsv" | "jsonl" | "ndjson" => or_none(lists::table(path, column), &path.display()),
        "txt" | "lst" | "list" => or_none(lists::file_of_names(path), &path.display()),
        _ if is_packed(path) => alone(Err(Unlisted::new(&path.display(), &PACKED))),
        _ => alone(files::item(path)),
    }
}

/// As many pictures, and what cannot be listed before the last of them. Nothing is asked for beyond:
/// it may be yet to be typed.
pub(crate) fn first(mut list: List<'_>, mut count: usize) -> List<'_> {
    Box::new(iter::from_fn(move || {
        let listed = (count > 0).then(|| list.next()).flatten()?;
        count -= usize::from(listed.is_ok());
        Some(listed)
    }))
}

fn alone(listed: Listed) -> List<'static> {
    Box::new(iter::once(listed))
}

/// A list that is empty is most likely a mistake: it is told of.
fn or_none<'a>(list: List<'a>, name: &dyn Display) -> List<'a> {
    let mut list = list.peekable();
    if list.peek().is_none() {
        return alone(Err(Unlisted::new(name, &"there are no pictures")));
    }
    Box::new(list)
}

/// All arguments.
pub(crate) struct Sources {
    named: Vec<Source>,
    /// Of tables.
    column: Option<String>,
    fetcher: Fetcher,
}

impl Sources {
    pub(crate) fn new(
        arguments: &[String],
        column: Option<&str>,
        authorities: &Authorities,
    ) -> anyhow::Result<Self> {
        let sources: Vec<Source> =
            arguments.iter().map(|argument| Source::of(argument)).collect::<Result<_, _>>()?;
        let stdins = sources.iter().filter(|source| matches!(source, Source::Stdin)).count();
        ensure!(stdins < 2, "standard input can be read only once");
        Ok(Self {
            named: sources,
            column: column.map(str::to_owned),
            fetcher: fetcher(authorities)?,
        })
    }

    /// Whether the list can be made more than once, and soon.
    pub(crate) fn can_be_counted(&self) -> bool {
        !self.named.iter().any(|source| matches!(source, Source::Stdin | Source::Bucket(_)))
    }

    /// The pictures, in an order that is the same each time as long as nothing changes.
    pub(crate) fn list(&self) -> List<'_> {
        Box::new(self.named.iter().flat_map(|source| self.list_of(source)))
    }

    fn list_of<'a>(&'a self, source: &'a Source) -> List<'a> {
        let column = self.column.as_deref();
        match source {
            Source::Stdin => {
                let name = "standard input";
                or_none(lists::names(BufReader::new(io::stdin()), name, Path::new("")), &name)
            }
            Source::Address(address) => {
                let place = Place::Address(address.clone());
                alone(Ok(Item { name: address.clone(), place }))
            }
            Source::Bucket(address) => or_none(bucket::objects(&self.fetcher, address), address),
            Source::Folder(path) => or_none(files::folder(path), &path.display()),
            Source::File(path) => of_file(path, column),
            Source::Glob(glob) => {
                let listed = move |file: Result<PathBuf, Unlisted>| match file {
                    Ok(path) => of_file(&path, column),
                    Err(unlisted) => alone(Err(unlisted)),
                };
                or_none(Box::new(glob.files().flat_map(listed)), glob)
            }
        }
    }

    /// A picture's bytes, or why there are none.
    pub(crate) fn read(&self, place: &Place, stop: &Stop) -> Result<Vec<u8>, String> {
        let in_words = |error: io::Error| format!("cannot read it: {error}");
        match place {
            Place::File(path) => {
                let file = File::open(path).map_err(in_words)?;
                bounded(file, MOST_BYTES).map_err(in_words)?.ok_or_else(too_large)
            }
            Place::Member { archive, offset, size } => {
                if *size > MOST_BYTES {
                    return Err(too_large());
                }
                let mut file = File::open(archive).map_err(in_words)?;
                file.seek(SeekFrom::Start(*offset)).map_err(in_words)?;
                let mut bytes = Vec::new();
                file.take(*size).read_to_end(&mut bytes).map_err(in_words)?;
                if bytes.len() as u64 == *size {
                    Ok(bytes)
                } else {
                    Err("the archive ends within it".to_owned())
                }
            }
            Place::Address(address) => {
                let limits = FetchLimits { bytes: MOST_BYTES, ..FetchLimits::default() };
                let fetch = || self.fetcher.fetch(address, &limits, stop);
                patiently(stop, fetch).map_err(|error| error.to_string())
            }
        }
    }
}

fn too_large() -> String {
    format!("the file is larger than {} MiB", MOST_BYTES >> 20)
}

/// All of a file, if it is not longer than this.
fn bounded(file: File, most: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= most).then_some(bytes))
}

/// Tries again what may succeed another time.
fn patiently<T>(
    stop: &Stop,
    mut attempt: impl FnMut() -> Result<T, FetchError>,
) -> Result<T, FetchError> {
    const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
    for pause in PAUSES {
        match attempt() {
            Err(error) if error.is_transient() && !stop.is_stopped() => thread::sleep(pause),
            result => return result,
        }
    }
    attempt()
}

/// Whoever gives the command may ask whatever host they like, with the credentials of their own
/// environment where it has some.
fn fetcher(authorities: &Authorities) -> anyhow::Result<Fetcher> {
    let has = |names: &[&str]| names.iter().any(|name| std::env::var_os(name).is_some());
    let mut buckets = String::new();
    if has(&["AWS_ACCESS_KEY_ID"]) {
        buckets.push_str("s3://* ");
    }
    if has(&["GOOGLE_APPLICATION_CREDENTIALS", "GCE_METADATA_HOST"]) {
        buckets.push_str("gs://*");
    }
    let networks = "0.0.0.0/0 ::/0".parse().map_err(anyhow::Error::msg)?;
    let rules = AccessRules { allow_networks: networks, ..AccessRules::default() };
    let buckets = buckets.parse().map_err(anyhow::Error::msg)?;
    Ok(Fetcher::new(rules, buckets, authorities))
}
