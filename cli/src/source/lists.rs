//! Names and addresses in a file: one a line, or in a column of a table. A name is looked for where
//! the program runs, then beside the file.

use std::{
    fmt::Display,
    fs::File,
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{Item, List, Listed, Place, Unlisted, is_address};

/// What a column is called if nobody says so.
const USUAL: [&str; 5] = ["file", "file_name", "image", "path", "url"];

fn named(name: &str, beside: &Path) -> Item {
    let place = if is_address(name) {
        Place::Address(name.to_owned())
    } else {
        let path = PathBuf::from(name);
        let other = beside.join(name);
        Place::File(if !path.exists() && other.exists() { other } else { path })
    };
    Item { name: name.to_owned(), place }
}

fn alone<'a>(path: &Path, reason: &dyn Display) -> List<'a> {
    Box::new(std::iter::once(Err(Unlisted::new(&path.display(), reason))))
}

fn folder_of(path: &Path) -> PathBuf {
    path.parent().map(Path::to_owned).unwrap_or_default()
}

pub(super) fn file_of_names(path: &Path) -> List<'static> {
    match File::open(path) {
        Ok(file) => names(BufReader::new(file), &folder_of(path)),
        Err(error) => alone(path, &format!("cannot read it: {error}")),
    }
}

/// One a line; empty lines are none.
pub(super) fn names(lines: impl BufRead + Send + 'static, beside: &Path) -> List<'static> {
    let beside = beside.to_owned();
    let listed = move |line: io::Result<String>| match line {
        Ok(line) if line.trim().is_empty() => None,
        Ok(line) => Some(Ok(named(line.trim(), &beside))),
        Err(error) => Some(Err(Unlisted::new(&"list", &format!("cannot read it: {error}")))),
    };
    Box::new(up_to_a_failure(lines.lines()).filter_map(listed))
}

/// A reader that fails once may fail for ever.
fn up_to_a_failure<T, E>(
    read: impl Iterator<Item = Result<T, E>>,
) -> impl Iterator<Item = Result<T, E>> {
    let mut has_failed = false;
    read.take_while(move |item| !std::mem::replace(&mut has_failed, item.is_err()))
}

/// A column of a table: CSV with a head, the same with tabs, or a JSON object a line.
pub(super) fn table<'a>(path: &'a Path, column: Option<&'a str>) -> List<'a> {
    let extension = path.extension().map(|it| it.to_string_lossy().to_ascii_lowercase());
    let file = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(error) => return alone(path, &format!("cannot read it: {error}")),
    };
    match extension.as_deref() {
        Some("csv") => separated(file, b',', path, column),
        Some("tsv") => separated(file, b'\t', path, column),
        _ => objects(file, path, column),
    }
}

fn no_column(column: Option<&str>, there: &str) -> String {
    match column {
        Some(column) => format!("there is no column {column}, but {there}"),
        None => format!("which column? --column names one of {there}"),
    }
}

fn separated<'a>(
    file: BufReader<File>,
    delimiter: u8,
    path: &Path,
    column: Option<&str>,
) -> List<'a> {
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(file);
    let head = match reader.headers() {
        Ok(head) => head.clone(),
        Err(error) => return alone(path, &error),
    };
    let place = |name: &str| head.iter().position(|it| it.trim() == name);
    let found = match column {
        Some(column) => place(column),
        None => USUAL.into_iter().find_map(place),
    };
    let Some(index) = found else {
        return alone(path, &no_column(column, &head.iter().collect::<Vec<_>>().join(", ")));
    };
    let (beside, shown) = (folder_of(path), path.display().to_string());
    let listed = move |record: csv::Result<csv::StringRecord>| match record {
        Ok(record) => {
            let name = record.get(index).map(str::trim).filter(|name| !name.is_empty())?;
            Some(Ok(named(name, &beside)))
        }
        Err(error) => Some(Err(Unlisted::new(&shown, &error))),
    };
    Box::new(up_to_a_failure(reader.into_records()).filter_map(listed))
}

fn objects<'a>(file: BufReader<File>, path: &Path, column: Option<&'a str>) -> List<'a> {
    let (beside, shown) = (folder_of(path), path.display().to_string());
    let mut number = 0;
    let listed = move |line: io::Result<String>| -> Option<Listed> {
        number += 1;
        let refused = |reason: String| Err(Unlisted::new(&format!("{shown}:{number}"), &reason));
        let line = match line {
            Ok(line) if line.trim().is_empty() => return None,
            Ok(line) => line,
            Err(error) => return Some(refused(format!("cannot read it: {error}"))),
        };
        Some(match serde_json::from_str::<Value>(&line) {
            Ok(Value::Object(fields)) => {
                let text = |name: &str| fields.get(name).and_then(Value::as_str);
                let name = match column {
                    Some(column) => text(column),
                    None => USUAL.into_iter().find_map(text),
                };
                let there = || fields.keys().cloned().collect::<Vec<_>>().join(", ");
                name.map_or_else(
                    || refused(no_column(column, &there())),
                    |name| Ok(named(name, &beside)),
                )
            }
            _ => refused("the line is not a JSON object".to_owned()),
        })
    };
    Box::new(up_to_a_failure(file.lines()).filter_map(listed))
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
        let jsonl = write("a.jsonl", "{\"file_name\": \"a.png\"}\n\n[]\n{\"x\": \"b.png\"}\n");
        let found = names_of(table(&jsonl, None));
        assert_eq!(found[0], Ok("a.png".to_owned()));
        assert_eq!(found[1], Err("the line is not a JSON object".to_owned()));
        assert_eq!(found[2], Err("which column? --column names one of x".to_owned()));
    }

    #[test]
    fn names_are_looked_for_beside_the_list_too() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.png"), "").unwrap();
        let list = directory.path().join("list.txt");
        std::fs::write(&list, "a.png\n\n  gs://bucket/b.png\nnowhere.png\n").unwrap();
        let places: Vec<Place> = file_of_names(&list).map(|item| item.unwrap().place).collect();
        let expected = [
            Place::File(directory.path().join("a.png")),
            Place::Address("gs://bucket/b.png".to_owned()),
            Place::File("nowhere.png".into()),
        ];
        assert_eq!(places, expected);
    }
}
