//! Names and addresses in a file: one a line, or in a column of a table. A name is looked for where
//! the program runs, then beside the file.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    iter,
    path::{Path, PathBuf},
    str,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use florence_engine::fetch::file_of_url;
use serde_json::Value;

use super::{Item, List, Listed, Place, Unlisted, alone, ending, files, is_address, plain};

/// What a column is called if nobody says so.
const USUAL: [&str; 5] = ["file", "file_name", "image", "path", "url"];

/// A picture that stands in a list, there.
fn named(name: &str, beside: &Path, there: &str) -> Listed {
    if name.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:")) {
        let reason = "a data: URL is no name that the output could tell: let it be a file";
        return Err(Unlisted::new(&there, &reason));
    }
    if is_address(name) {
        return Ok(Item { name: name.to_owned(), place: Place::Address(name.to_owned()) });
    }
    let path = file_of_url(name.as_bytes()).unwrap_or_else(|| {
        let (path, other) = (PathBuf::from(name), beside.join(name));
        if !path.exists() && other.exists() { other } else { path }
    });
    // Two lists may call different pictures alike, and one calls a picture in several ways.
    files::item(&plain(&path))
}

fn folder_of(path: &Path) -> PathBuf {
    path.parent().map(Path::to_owned).unwrap_or_default()
}

fn open(path: &Path) -> Result<BufReader<File>, Unlisted> {
    let unlisted = |error| Unlisted::new(&path.display(), &format!("cannot read it: {error}"));
    File::open(path).map(BufReader::new).map_err(unlisted)
}

pub(super) fn file_of_names(path: &Path) -> List<'static> {
    match open(path) {
        Ok(file) => names(file, &path.display().to_string(), &folder_of(path)),
        Err(unlisted) => alone(Err(unlisted)),
    }
}

/// One a line; empty lines are none.
pub(super) fn names(
    reader: impl BufRead + Send + 'static,
    shown: &str,
    beside: &Path,
) -> List<'static> {
    let beside = beside.to_owned();
    Box::new(
        lines(reader, shown)
            .map(move |line| line.and_then(|line| named(line.text.trim(), &beside, &line.shown))),
    )
}

/// A line, and where it stands.
struct Line {
    text: String,
    shown: String,
}

/// Lines that are not empty. One that is no text is told of, and the others are read.
fn lines(
    reader: impl BufRead + Send + 'static,
    shown: &str,
) -> impl Iterator<Item = Result<Line, Unlisted>> + Send + 'static {
    const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
    let shown = shown.to_owned();
    let listed = move |(number, line): (u64, io::Result<Vec<u8>>)| {
        let shown = format!("{shown}:{number}");
        let text = line.map_err(|error| error.to_string()).and_then(|line| {
            let plain = line.strip_prefix(BYTE_ORDER_MARK).filter(|_| number == 1);
            let text = str::from_utf8(plain.unwrap_or(&line)).map_err(|error| error.to_string());
            text.map(str::to_owned)
        });
        match text {
            Ok(text) if text.trim().is_empty() => None,
            Ok(text) => Some(Ok(Line { text, shown })),
            Err(reason) => Some(Err(Unlisted::new(&shown, &format!("cannot read it: {reason}")))),
        }
    };
    (1..).zip(up_to_a_failure(reader.split(b'\n'))).filter_map(listed)
}

/// A reader that fails once may fail for ever.
fn up_to_a_failure<T, E>(
    read: impl Iterator<Item = Result<T, E>>,
) -> impl Iterator<Item = Result<T, E>> {
    let mut has_failed = false;
    read.take_while(move |item| !std::mem::replace(&mut has_failed, item.is_err()))
}

/// A column of a table: CSV with a head, the same with tabs, or a JSON object a line.
pub(super) fn table(path: &Path, column: Option<&str>) -> List<'static> {
    let file = match open(path) {
        Ok(file) => file,
        Err(unlisted) => return alone(Err(unlisted)),
    };
    match &*ending(path) {
        "csv" => separated(file, b',', path, column),
        "tsv" => separated(file, b'\t', path, column),
        _ => objects(file, path, column),
    }
}

/// What stands under the name that is given, or else under the first usual one.
fn in_column<T>(column: Option<&str>, find: impl Fn(&str) -> Option<T>) -> Option<T> {
    match column {
        Some(column) => find(column),
        None => USUAL.into_iter().find_map(find),
    }
}

fn no_column(column: Option<&str>, there: &str) -> String {
    match column {
        Some(column) => format!("there is no column {column}, but {there}"),
        None => format!("which column? --column names one of {there}"),
    }
}

fn separated(
    file: BufReader<File>,
    delimiter: u8,
    path: &Path,
    column: Option<&str>,
) -> List<'static> {
    // Between tabs a quotation mark is a letter like others.
    let has_quotes = delimiter == b',';
    let open = Arc::new(AtomicU64::new(0));
    let file = Quotes { file, delimiter, state: State::Begin, line: 1, open: Arc::clone(&open) };
    let mut reader = csv::ReaderBuilder::new();
    let reader = reader.delimiter(delimiter).quoting(has_quotes).flexible(true);
    let mut reader = reader.from_reader(file);
    let head: Vec<String> = match reader.byte_headers() {
        Ok(head) => {
            head.iter().map(|it| unquoted(String::from_utf8_lossy(it).trim(), has_quotes)).collect()
        }
        Err(error) => return alone(Err(Unlisted::new(&path.display(), &error))),
    };
    let found = in_column(column, |name| head.iter().position(|it| it == name));
    let Some(index) = found else {
        let reason = no_column(column, &head.join(", "));
        return alone(Err(Unlisted::new(&path.display(), &reason)));
    };
    let (beside, shown, count) = (folder_of(path), path.display().to_string(), head.len());
    let table = shown.clone();
    let listed = move |record: csv::Result<csv::ByteRecord>| {
        let record = match record {
            Ok(record) => record,
            Err(error) => return Some(Err(Unlisted::new(&shown, &error))),
        };
        let line = record.position().map_or(0, csv::Position::line);
        let refused =
            |reason: String| Some(Err(Unlisted::new(&format!("{shown}:{line}"), &reason)));
        if record.len() != count {
            return refused(format!("it has {} fields, and the head has {count}", record.len()));
        }
        match str::from_utf8(&record[index]) {
            Ok(name) if name.trim().is_empty() => None,
            Ok(name) => {
                Some(named(&unquoted(name.trim(), has_quotes), &beside, &format!("{shown}:{line}")))
            }
            Err(error) => refused(format!("its name is no text: {error}")),
        }
    };
    let rows = up_to_a_failure(reader.into_byte_records()).filter_map(listed);
    // Rows may have been taken for a part of a field.
    let unclosed = iter::once_with(move || {
        let line = open.load(Relaxed);
        let reason = "the quotation mark is not closed, so what follows it was not read";
        (has_quotes && line > 0).then(|| Err(Unlisted::new(&format!("{table}:{line}"), &reason)))
    });
    Box::new(rows.chain(unclosed.flatten()))
}

/// What stands between quotation marks, where the reader leaves these.
fn unquoted(field: &str, are_read: bool) -> String {
    let inner = field.strip_prefix('"').and_then(|it| it.strip_suffix('"'));
    match inner.filter(|_| !are_read) {
        Some(inner) => inner.replace("\"\"", "\""),
        None => field.to_owned(),
    }
}

/// What the last byte of a table was part of.
#[derive(Clone, Copy)]
enum State {
    /// Nothing: a field begins.
    Begin,
    Field,
    Quoted,
    /// A quotation mark within quotation marks, which ends the field or stands for one.
    Closing,
}

/// Passes on a table, and knows on which line a field begins that is not closed; 0 if there is none.
/// The reader itself takes such a field for one that ends with the file.
struct Quotes {
    file: BufReader<File>,
    delimiter: u8,
    state: State,
    line: u64,
    open: Arc<AtomicU64>,
}

impl Read for Quotes {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.file.read(buffer)?;
        for &byte in &buffer[..length] {
            let is_end = byte == self.delimiter || byte == b'\n' || byte == b'\r';
            self.state = match (self.state, byte) {
                (State::Begin, b'"') => {
                    self.open.store(self.line, Relaxed);
                    State::Quoted
                }
                (State::Quoted, b'"') => State::Closing,
                (State::Quoted, _) | (State::Closing, b'"') => State::Quoted,
                (_, _) if is_end => State::Begin,
                _ => State::Field,
            };
            if byte == b'\n' {
                self.line += 1;
            }
        }
        if length == 0 && !matches!(self.state, State::Quoted) {
            self.open.store(0, Relaxed);
        }
        Ok(length)
    }
}

fn objects(file: BufReader<File>, path: &Path, column: Option<&str>) -> List<'static> {
    let (beside, column) = (folder_of(path), column.map(str::to_owned));
    let listed = move |line: Result<Line, Unlisted>| -> Listed {
        let line = line?;
        let refused = |reason: &str| Err(Unlisted::new(&line.shown, &reason));
        let Ok(Value::Object(fields)) = serde_json::from_str(&line.text) else {
            return refused("the line is not a JSON object");
        };
        let there = || fields.keys().cloned().collect::<Vec<_>>().join(", ");
        let found = |name: &str| fields.get_key_value(name);
        let text = |name: &str| fields.get(name).and_then(Value::as_str);
        // A usual one that is no text may stand beside one that is.
        match (in_column(column.as_deref(), text), in_column(column.as_deref(), found)) {
            (Some(name), _) => named(name, &beside, &line.shown),
            (None, Some((column, _))) => refused(&format!("its {column} is no text")),
            (None, None) => refused(&no_column(column.as_deref(), &there())),
        }
    };
    Box::new(lines(file, &path.display().to_string()).map(listed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_of(list: List<'_>) -> Vec<Result<String, String>> {
        list.map(|it| it.map(|item| item.name).map_err(|it| it.reason)).collect()
    }

    #[test]
    fn tables_give_the_column_that_is_named_or_the_usual_one() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let csv = write("a.csv", "id,image,url\n1,\"a, b.png\",http://x/y.png\n2,,\n");
        assert_eq!(names_of(table(&csv, None)), [Ok("a, b.png".to_owned())]);
        assert_eq!(names_of(table(&csv, Some("url"))), [Ok("http://x/y.png".to_owned())]);
        let refused = "there is no column no, but id, image, url".to_owned();
        assert_eq!(names_of(table(&csv, Some("no"))), [Err(refused)]);
        let tsv = write("a.tsv", "id\tpicture\n1\ta.png\n");
        assert_eq!(names_of(table(&tsv, Some("picture"))), [Ok("a.png".to_owned())]);
        let jsonl = write(
            "a.jsonl",
            "{\"file_name\": \"a.png\"}\n\n[]\n{\"x\": \"b.png\"}\n{\"image\": null}\n",
        );
        let found = names_of(table(&jsonl, None));
        assert_eq!(found[0], Ok("a.png".to_owned()));
        assert_eq!(found[1], Err("the line is not a JSON object".to_owned()));
        assert_eq!(found[2], Err("which column? --column names one of x".to_owned()));
        assert_eq!(found[3], Err("its image is no text".to_owned()));
    }

    #[test]
    fn a_bad_row_takes_no_other_along() {
        let directory = tempfile::tempdir().unwrap();
        let listed = |name: &str, bytes: &[u8]| {
            let path = directory.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let listed = super::super::of_file(&path, None);
            let beside = format!("{}/", directory.path().display());
            let told =
                |error: Unlisted| format!("{}: {}", error.name.replace(&beside, ""), error.reason);
            listed.map(|it| it.map_or_else(told, |item| item.name)).collect::<Vec<_>>()
        };
        let rows = listed(
            "a.csv",
            b"image,text\na.png,1\nb.png\nc.png,\xff\n\xff.png,2\nd.png,5\" wide\n",
        );
        assert_eq!(rows[0], "a.png");
        assert_eq!(rows[1], "a.csv:3: it has 1 fields, and the head has 2");
        assert_eq!(rows[2], "c.png");
        assert!(rows[3].starts_with("a.csv:5: its name is no text: "), "{}", rows[3]);
        assert_eq!(rows[4..], ["d.png"]);
        let unclosed = listed("b.csv", b"image,text\na.png,\"x\n\"\"y\"\nb.png,\"z\nc.png,1\n");
        let told = "b.csv:4: the quotation mark is not closed, so what follows it was not read";
        assert_eq!(unclosed, ["a.png", "b.png", told]);
        let tabs = b"image\ttext\na.png\t\"Stop\" said he\nb.png\t\"a start\n\"c, \"\"d.png\"\tx\ne.png\t\"\n";
        assert_eq!(listed("a.tsv", tabs), ["a.png", "b.png", "c, \"d.png", "e.png"]);
        let names = listed("a.txt", b"\xef\xbb\xbfa.png\r\n\xff.png\nb.png");
        assert_eq!((names[0].as_str(), names[2].as_str()), ("a.png", "b.png"));
        assert!(names[1].starts_with("a.txt:2: cannot read it: "), "{}", names[1]);
        assert_eq!(listed("a.jsonl", b"\xef\xbb\xbf{\"image\": \"a.png\"}\n"), ["a.png"]);
    }

    #[test]
    fn names_are_looked_for_beside_the_list_too() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.png"), "").unwrap();
        std::fs::create_dir(directory.path().join("b")).unwrap();
        let list = directory.path().join("list.txt");
        let text = "a.png\n./b/../a.png\n\n  gs://bucket/b.png\nnowhere.png\nfile:///a%20b/c#1.png\ndata:,x\n";
        std::fs::write(&list, text).unwrap();
        let mut places: Vec<Listed> = file_of_names(&list).collect();
        let refused = places.pop().unwrap().unwrap_err();
        assert!(refused.name.ends_with("list.txt:7"), "{}", refused.name);
        let items: Vec<Item> = places.into_iter().map(Result::unwrap).collect();
        let beside = directory.path().join("a.png").display().to_string();
        let names: Vec<&str> = items.iter().map(|item| item.name.as_str()).collect();
        assert_eq!(names[..4], [&*beside, &beside, "gs://bucket/b.png", "nowhere.png"]);
        let places: Vec<Place> = items.into_iter().map(|item| item.place).collect();
        let expected = [
            Place::File(directory.path().join("a.png")),
            Place::File(directory.path().join("a.png")),
            Place::Address("gs://bucket/b.png".to_owned()),
            Place::File("nowhere.png".into()),
            Place::File("/a b/c#1.png".into()),
        ];
        assert_eq!(places, expected);
    }
}
