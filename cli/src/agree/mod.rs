//! `florence agree`: what a precision costs on pictures of one's own. All are asked in float32 and in
//! other precisions; a table tells how far the answers are the same and how long they took, a page
//! shows those that differ most.
//!
//! - `compare`: two answers (pure)
//! - `page`: the page

mod compare;
mod page;

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, ensure};
use florence_engine::{Answer, Florence, Precision};

use crate::{
    asked::{Asked, AskedArgs},
    load::ModelArgs,
    whole,
};
use compare::{Agreement, Difference};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    asked: AskedArgs,
    /// Precisions that are compared with float32
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "auto,int16,bf16,int8"
    )]
    precisions: Vec<String>,
    /// Answers that are shown of each precision, those that differ most
    #[arg(long, value_name = "N", default_value_t = 10)]
    worst: usize,
    /// The page to write
    #[arg(long, value_name = "FILE", default_value = "agree.html")]
    out: PathBuf,
}

/// All that was asked, in one precision.
struct Column {
    name: String,
    /// Or why there are no answers.
    answers: Result<Answers, String>,
}

struct Answers {
    arithmetic: String,
    /// One for each question.
    each: Vec<Answer>,
    seconds: f64,
}

/// A precision beside float32.
struct Row {
    name: String,
    arithmetic: String,
    per_second: f64,
    /// Of float32 with itself there is none.
    agreement: Option<Agreement>,
    /// By the number of the question, the worst first.
    worst: Vec<(usize, Difference)>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let precisions: Vec<(&String, Precision)> = args
        .precisions
        .iter()
        .map(|name| Ok((name, name.parse().map_err(anyhow::Error::msg)?)))
        .collect::<anyhow::Result<_>>()?;
    let asked = args.asked.read()?;
    ensure!(
        !args.asked.reads(&asked, &args.out),
        "{} would be written over: it is read",
        args.out.display()
    );
    let reference = column(args, "f32", Precision::F32, &asked)?;
    let reference_answers = reference.answers.as_ref().map_err(|it| anyhow::anyhow!("{it}"))?;
    let mut rows = vec![Row {
        name: reference.name.clone(),
        arithmetic: reference_answers.arithmetic.clone(),
        per_second: per_second(&asked, reference_answers),
        agreement: None,
        worst: Vec::new(),
    }];
    let mut columns = Vec::new();
    for (name, precision) in precisions {
        let column = column(args, name, precision, &asked)?;
        match &column.answers {
            Ok(answers) => rows.push(row(args, &asked, reference_answers, name, answers)),
            Err(reason) => eprintln!("{name}: {reason}"),
        }
        columns.push(column);
    }
    tellln!("{}", table(&rows).trim_end());
    let page = page::page(args, &asked, reference_answers, &columns, &rows)?;
    whole::write(&args.out, page.as_bytes())
        .with_context(|| format!("cannot write {}", args.out.display()))?;
    tellln!("{}", args.out.display());
    Ok(())
}

/// Asks everything in a precision that this machine may not have.
fn column(args: &Args, name: &str, precision: Precision, asked: &Asked) -> anyhow::Result<Column> {
    let answers = match args.model.load_in(precision) {
        Ok(florence) => Ok(answers(args, &florence, asked)?),
        Err(error) => Err(format!("{error:#}")),
    };
    Ok(Column { name: name.to_owned(), answers })
}

fn answers(args: &Args, florence: &Florence, asked: &Asked) -> anyhow::Result<Answers> {
    let (mut answers, mut seconds) = (Vec::new(), 0.0);
    for (i, question) in asked.questions.iter().enumerate() {
        let prepared = args.asked.prepared(florence, asked, question)?;
        if i == 0 {
            // What is done once is not counted.
            args.asked.answer(florence, &prepared)?;
        }
        let start = Instant::now();
        answers.push(args.asked.answer(florence, &prepared)?);
        seconds += start.elapsed().as_secs_f64();
    }
    Ok(Answers { arithmetic: florence.arithmetic(), each: answers, seconds })
}

fn per_second(asked: &Asked, answers: &Answers) -> f64 {
    asked.questions.len() as f64 / answers.seconds.max(1e-9)
}

fn row(args: &Args, asked: &Asked, reference: &Answers, name: &str, answers: &Answers) -> Row {
    let mut agreement = Agreement::default();
    let mut worst = Vec::new();
    for (i, (expected, found)) in reference.each.iter().zip(&answers.each).enumerate() {
        let difference = Difference::of(expected, found);
        agreement.add(&difference);
        if !difference.ids {
            worst.push((i, difference));
        }
    }
    worst.sort_by(|(_, a), (_, b)| a.share().total_cmp(&b.share()));
    worst.truncate(args.worst);
    Row {
        name: name.to_owned(),
        arithmetic: answers.arithmetic.clone(),
        per_second: per_second(asked, answers),
        agreement: Some(agreement),
        worst,
    }
}

const HEAD: [&str; 8] = [
    "precision",
    "computed in",
    "answers",
    "same ids",
    "same texts",
    "found alike",
    "IoU",
    "a second",
];

/// A row's cells, as they are read by people.
fn cells(row: &Row) -> [String; 8] {
    let mut cells: [String; 8] = Default::default();
    (cells[0], cells[1]) = (row.name.clone(), row.arithmetic.clone());
    if let Some(agreement) = &row.agreement {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        cells[2] = agreement.answers.to_string();
        cells[3] = percent(agreement.ids as f64 / agreement.answers as f64);
        cells[4] = percent(agreement.texts as f64 / agreement.answers as f64);
        cells[5] = agreement.found_alike().map_or("-".to_owned(), percent);
        cells[6] = agreement.mean_iou().map_or("-".to_owned(), |iou| format!("{iou:.4}"));
    }
    cells[7] = format!("{:.2}", row.per_second);
    cells
}

fn table(rows: &[Row]) -> String {
    let mut lines = vec![HEAD.map(str::to_owned)];
    lines.extend(rows.iter().map(cells));
    let width = |i: usize| lines.iter().map(|line| line[i].len()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let line = |line: &[String; 8]| {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    lines.iter().map(line).collect()
}
