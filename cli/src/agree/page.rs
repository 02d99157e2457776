//! The page: the table, and the answers that differ most, drawn on their pictures side by side.

use std::fmt::Write as _;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use florence_engine::Answer;
use image::imageops::{FilterType, resize};
use serde_json::json;

use super::{Answers, Args, Column, Difference, HEAD, Row, cells};
use crate::{
    asked::Asked,
    draw::{self, Findings},
};

/// The longer side of a picture on the page.
const SIDE: u32 = 560;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:76em;padding:0 1em}\
table{border-collapse:collapse}td,th{padding:.3em .9em;text-align:left;border-bottom:1px solid #ccc}\
td:nth-child(n+3),th:nth-child(n+3){text-align:right}figure{display:inline-block;margin:0 1em 0 0;\
vertical-align:top;width:47%}img{max-width:100%}code{background:#eee;padding:0 .3em}\
section{border-top:1px solid #ccc;margin-top:1em}";

pub(super) fn page(
    args: &Args,
    asked: &Asked,
    reference: &Answers,
    columns: &[Column],
    rows: &[Row],
) -> anyhow::Result<String> {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>florence agree</title>\n\
         <style>{STYLE}</style>\n<h1>Answers of other precisions beside float32</h1>\n\
         <p>{} pictures, {}.</p>\n<table><tr>",
        asked.items.len(),
        args.asked.tasks.iter().map(|task| code(task)).collect::<Vec<_>>().join(", ")
    );
    for name in HEAD {
        let _ = write!(page, "<th>{name}");
    }
    for row in rows {
        page.push_str("\n<tr>");
        for cell in cells(row) {
            let _ = write!(page, "<td>{}", escaped(&cell));
        }
    }
    page.push_str(
        "</table>\n<p>Found alike: the same label, and places with an intersection over \
                   union of at least 0.5; the F1 score of both directions.</p>\n",
    );
    for Column { name, answers } in columns {
        if let Err(reason) = answers {
            let _ = writeln!(page, "<p>{}: {}</p>", code(name), escaped(reason));
        }
    }
    for row in rows.iter().filter(|row| row.agreement.is_some()) {
        let of_row = columns.iter().find(|column| column.name == row.name);
        let Some(Ok(answers)) = of_row.map(|column| &column.answers) else { continue };
        let _ = writeln!(page, "<h2>{}</h2>", escaped(&row.name));
        if row.worst.is_empty() {
            page.push_str("<p>All answers have the same tokens.</p>\n");
        }
        for (question, difference) in &row.worst {
            let both = [&reference.each[*question], &answers.each[*question]];
            case(&mut page, args, asked, (*question, difference), (both, &row.name))?;
        }
    }
    page.push_str("</html>\n");
    Ok(page)
}

fn case(
    page: &mut String,
    args: &Args,
    asked: &Asked,
    (question, difference): (usize, &Difference),
    (both, name): ([&Answer; 2], &str),
) -> anyhow::Result<()> {
    let question = &asked.questions[question];
    let (item, bytes) = &asked.items[question.picture];
    let Difference { expected, found, alike, .. } = difference;
    let _ = writeln!(
        page,
        "<section><p>{} {}: {} found in float32, {} here, {} alike</p>",
        code(&item.name),
        code(&question.prompt),
        expected,
        found,
        alike
    );
    let picture = draw::decode(bytes, args.asked.ask.exif)?;
    let (width, height) = picture.dimensions();
    let scale = (f64::from(SIDE) / f64::from(width.max(height))).min(1.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "below SIDE")]
    let size = |side: u32| ((f64::from(side) * scale).round() as u32).max(1);
    let small = resize(&picture, size(width), size(height), FilterType::Triangle);
    for (answer, name) in both.into_iter().zip(["float32", name]) {
        let mut marks = Findings::read(&answer.json, &json!(answer.scores));
        marks.ask(std::slice::from_ref(&question.prompt), (f64::from(width), f64::from(height)));
        marks.scale((scale, scale));
        let jpeg = BASE64_STANDARD.encode(draw::drawn(&small, &marks)?);
        let _ = writeln!(
            page,
            "<figure><figcaption>{}</figcaption><img alt=\"\" src=\"data:image/jpeg;base64,{jpeg}\"></figure>",
            escaped(name)
        );
    }
    page.push_str("</section>\n");
    Ok(())
}

fn code(text: &str) -> String {
    format!("<code>{}</code>", escaped(text))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use florence_engine::Timings;

    use super::{super::*, *};
    use crate::{asked::Question, source::Item};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    const PICTURE: &[u8] = include_bytes!("../../../models/tiny/samples/shapes.png");

    fn answers(right: f64, id: u32) -> Answers {
        let json = json!({ "<OD>": { "bboxes": [[10.0, 10.0, right, 60.0]], "labels": ["<b>"] } });
        let answer = Answer {
            text: String::new(),
            token_ids: vec![0, id, 2],
            json,
            scores: vec![0.5],
            size: (360, 280),
            score: 0.0,
            n_best: Vec::new(),
            timings: Timings::default(),
        };
        Answers { arithmetic: "made up".to_owned(), each: vec![answer], seconds: 2.0 }
    }

    #[test]
    fn answers_that_differ_are_drawn_side_by_side_and_texts_stay_texts() {
        let cli = Cli::parse_from(["agree", "<i>.png"]);
        let item =
            Item { name: "<i>.png".to_owned(), place: crate::source::Place::File("x".into()) };
        let asked = Asked {
            items: vec![(item, PICTURE.to_owned())],
            questions: vec![Question { picture: 0, prompt: "<OD>".to_owned() }],
        };
        let reference = answers(110.0, 1);
        let columns = [
            Column { name: "int16".to_owned(), answers: Ok(answers(85.0, 7)) },
            Column { name: "bf16".to_owned(), answers: Err("<not> here".to_owned()) },
        ];
        let Ok(found) = &columns[0].answers else { unreachable!() };
        let rows = [row(&cli.args, &asked, &reference, "int16", found)];
        let told = table(&rows);
        assert!(told.contains("int16      made up      1        0.0 %     100.0 %"), "{told}");
        assert!(told.contains("100.0 %      0.7500  0.50"), "{told}");
        let page = page(&cli.args, &asked, &reference, &columns, &rows).unwrap();
        assert_eq!(page.matches("<img alt=\"\" src=\"data:image/jpeg;base64,/9j/").count(), 2);
        assert!(
            page.contains("<code>&lt;i&gt;.png</code> <code>&lt;OD&gt;</code>: 1 found"),
            "{page}"
        );
        assert!(page.contains("<code>bf16</code>: &lt;not&gt; here"), "{page}");
        assert!(!page.contains("<i>") && !page.contains("<b>"), "{page}");
    }
}
