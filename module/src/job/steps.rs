//! The steps of a chain, as a job's hash keeps them: a JSON list of `{"then": prompt}`.

use florence_engine::chain::{Link, Step};
use serde_json::{Map, Value, json};

/// The field's text.
pub(super) fn written(steps: &[Step]) -> String {
    let step = |step: &Step| {
        let entry = (step.link.name().to_owned(), json!(step.prompt));
        Value::Object(Map::from_iter([entry]))
    };
    steps.iter().map(step).collect::<Value>().to_string()
}

/// The steps of a field; none if it is not as we write it.
pub(super) fn read(text: &str) -> Option<Vec<Step>> {
    let entries: Vec<Map<String, Value>> = serde_json::from_str(text).ok()?;
    let step = |entry: Map<String, Value>| {
        let mut entry = entry.into_iter();
        let (link, prompt) = entry.next().filter(|_| entry.next().is_none())?;
        Some(Step { link: Link::named(&link)?, prompt: prompt.as_str()?.to_owned() })
    };
    entries.into_iter().map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let steps: Vec<Step> =
            ["THEN <OCR>", "EACH a \"{}\"", "CROP <OD>"].map(|step| step.parse().unwrap()).into();
        assert_eq!(written(&steps), r#"[{"then":"<OCR>"},{"each":"a \"{}\""},{"crop":"<OD>"}]"#);
        assert_eq!(read(&written(&steps)), Some(steps));
        for other in [
            "",
            "{}",
            "[1]",
            r#"["a"]"#,
            "[{}]",
            r#"[{"then":1}]"#,
            r#"[{"after":"a"}]"#,
            r#"[{"then":"a","each":"b"}]"#,
        ] {
            assert_eq!(read(other), None, "{other}");
        }
    }
}
