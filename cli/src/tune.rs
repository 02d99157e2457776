//! `florence tune`: which products of a model may be int8, by what that costs on pictures of one's
//! own.
//!
//! Each product's share of the error is how far the probabilities of the next tokens go when it
//! alone is int8; its gain is the time that it saves. Those that gain most for their error come
//! first in the plan, which is as long as the wished share of float32's tokens allows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use florence_engine::{
    Cpu, Florence, Part, Precision,
    model::{Int8, Trial},
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::{
    asked::{Asked, AskedArgs, Question},
    load::ModelArgs,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    asked: AskedArgs,
    /// Share of the tokens that must stay those of float32
    #[arg(long, value_name = "SHARE", default_value_t = 0.995)]
    agreement: f64,
    /// Questions that each product's error is measured on, the first ones
    #[arg(long, value_name = "N", default_value_t = 4)]
    measured: usize,
}

/// Rounds that times are measured in; the least counts.
const ROUNDS: usize = 4;

/// A product that is faster in int8.
#[derive(Debug, Clone, PartialEq)]
struct Product {
    name: String,
    /// Nanoseconds of thread time that int8 saves, over the measured questions.
    saved: f64,
    /// Mean divergence of the next tokens' probabilities, in nats.
    error: f64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let Args { model, asked: args, agreement: wished, measured } = args;
    ensure!((0.0..=1.0).contains(wished), "--agreement is a share, from 0 to 1");
    ensure!(*measured > 0, "--measured: each product is measured on at least 1 question");
    ensure!(Cpu::detect().has_int8(), "this processor has no int8 products");
    ensure!(model.has_directory(), "give --model: a plan is kept beside it");
    let asked = args.read()?;
    let questions = &asked.questions[..];
    let trial = Arc::new(Trial::default());
    let reference = tokens(args, &model.load_in(Precision::F32)?, &asked, questions)?;
    let florence = model.load_int8(Int8::Trial(Arc::clone(&trial)))?;
    let place = florence.model().plan_place().context("a plan has no place")?;
    let some = &questions[..(*measured).min(questions.len())];
    let tried = Tried { args, florence: &florence, trial: &trial, asked: &asked };
    let products = tried.products(some, &reference)?;
    eprintln!("{} of {} products are faster in int8", products.len(), trial.names().len());

    let kept = |count: usize| -> anyhow::Result<f64> {
        trial.switch(&names(&products[..count]));
        let share = agreement(&reference, &tried.tokens(questions)?);
        eprintln!("{count} products in int8 keep {:.2} % of the tokens", 100.0 * share);
        Ok(share)
    };
    let int16 = kept(0)?;
    ensure!(
        int16 >= *wished,
        "int16 alone keeps {:.2} % of the tokens: no plan keeps {:.2} %",
        100.0 * int16,
        100.0 * wished
    );
    // The longest beginning that keeps enough; more products are taken to keep less.
    let (mut count, mut share, mut lost) = (0, int16, products.len() + 1);
    while lost - count > 1 {
        // All of them first: they may be good enough.
        let more = if lost > products.len() { products.len() } else { count.midpoint(lost) };
        let found = kept(more)?;
        if found >= *wished {
            (count, share) = (more, found);
        } else {
            lost = more;
        }
    }
    let chosen = names(&products[..count]);
    let mut least = [f64::MAX; 2];
    tried.in_turns(some, [&BTreeSet::new(), &chosen], |i, took| {
        least[i] = least[i].min(took.as_secs_f64());
    })?;
    let faster = least[0] / least[1];
    tellln!("{}", table(&products, count).trim_end());
    tellln!(
        "{count} products in int8 keep {:.2} % of {} tokens, {faster:.2} times as fast as int16",
        100.0 * share,
        reference.iter().map(Vec::len).sum::<usize>(),
    );
    let measured = json!({
        "questions": questions.len(),
        "tasks": args.tasks,
        "agreement_int16": int16,
        "agreement": share,
        "speed_over_int16": faster,
        "arithmetic": florence.arithmetic(),
    });
    place
        .write(&place.plan(chosen, measured))
        .with_context(|| format!("cannot write {}", place.path().display()))?;
    tellln!("{}", place.path().display());
    Ok(())
}

fn names(products: &[Product]) -> BTreeSet<String> {
    products.iter().map(|product| product.name.clone()).collect()
}

/// The share of tokens that are the same in the same places.
fn agreement(expected: &[Vec<u32>], found: &[Vec<u32>]) -> f64 {
    let pairs = || expected.iter().zip(found);
    let same: usize = pairs().map(|(a, b)| a.iter().zip(b).filter(|(a, b)| a == b).count()).sum();
    let all: usize = pairs().map(|(a, b)| a.len().max(b.len())).sum();
    same as f64 / all.max(1) as f64
}

/// The answers to some questions, one at a time: a picture as the model's input is large.
fn tokens(
    args: &AskedArgs,
    florence: &Florence,
    asked: &Asked,
    questions: &[Question],
) -> anyhow::Result<Vec<Vec<u32>>> {
    let answer = |question| {
        let prepared = args.prepared(florence, asked, question)?;
        Ok(args.answer(florence, &prepared)?.token_ids)
    };
    questions.iter().map(answer).collect()
}

/// A model whose products can be switched, and what it is asked.
struct Tried<'a> {
    args: &'a AskedArgs,
    florence: &'a Florence,
    trial: &'a Trial,
    asked: &'a Asked,
}

impl Tried<'_> {
    fn tokens(&self, questions: &[Question]) -> anyhow::Result<Vec<Vec<u32>>> {
        tokens(self.args, self.florence, self.asked, questions)
    }

    /// Answers all with some products in int8 and with others, in turns, and shows how long it took.
    fn in_turns(
        &self,
        questions: &[Question],
        int8: [&BTreeSet<String>; 2],
        mut seen: impl FnMut(usize, Duration),
    ) -> anyhow::Result<()> {
        for _ in 0..ROUNDS {
            for (i, int8) in int8.iter().enumerate() {
                self.trial.switch(int8);
                self.trial.take_times();
                let start = Instant::now();
                self.tokens(questions)?;
                seen(i, start.elapsed());
            }
        }
        Ok(())
    }

    /// Those that are faster in int8, with what they save and cost, the best bargain first.
    fn products(
        &self,
        questions: &[Question],
        answers: &[Vec<u32>],
    ) -> anyhow::Result<Vec<Product>> {
        let all: BTreeSet<String> = self.trial.names().into_iter().collect();
        let none = BTreeSet::new();
        let mut least = [BTreeMap::new(), BTreeMap::new()];
        self.in_turns(questions, [&none, &all], |i, _| {
            for (name, time) in self.trial.take_times() {
                let entry = least[i].entry(name).or_insert(time);
                *entry = time.min(*entry);
            }
        })?;
        let [int16, int8] = least;
        let saved = int16.into_iter().filter_map(|(name, int16)| {
            let saved = int16 as f64 - *int8.get(&name)? as f64;
            (saved > 0.0).then_some((name, saved))
        });
        let saved: Vec<(String, f64)> = saved.collect();

        self.trial.switch(&none);
        let prepared = questions.iter().map(|it| self.args.prepared(self.florence, self.asked, it));
        let prepared = prepared.collect::<anyhow::Result<Vec<_>>>()?;
        // The last token is the end: nothing comes after it.
        let followed = prepared.iter().zip(answers).map(|(prepared, tokens)| {
            let [tokens @ .., _] = &tokens[..] else { bail!("an answer without a token") };
            Ok(self.florence.follow(prepared, tokens)?)
        });
        let followed = followed.collect::<anyhow::Result<Vec<_>>>()?;
        let bar = ProgressBar::new(saved.len() as u64).with_style(ProgressStyle::with_template(
            "{pos} of {len} products, {eta} left {wide_bar}",
        )?);
        let mut products = Vec::new();
        for (name, saved) in bar.wrap_iter(saved.into_iter()) {
            self.trial.switch(&BTreeSet::from([name.clone()]));
            let part = Part::of(&name);
            let errors = followed.iter().map(|followed| followed.divergence(part));
            let error = errors.sum::<Result<f64, _>>()? / followed.len() as f64;
            products.push(Product { name, saved, error: error.max(f64::MIN_POSITIVE) });
        }
        products.sort_by(|a, b| (a.error / a.saved).total_cmp(&(b.error / b.saved)));
        Ok(products)
    }
}

/// The products, those of the plan first: how much of the time that int8 could save, and of its
/// error, each has.
fn table(products: &[Product], chosen: usize) -> String {
    let sum = |part: fn(&Product) -> f64| products.iter().map(part).sum::<f64>();
    let (saved, error) = (sum(|product| product.saved), sum(|product| product.error));
    let mut lines = format!("{:5}  {:>7}  {:>7}  product\n", "", "saves", "error");
    for (i, product) in products.iter().enumerate() {
        let _ = writeln!(
            lines,
            "{:5}  {:5.1} %  {:5.1} %  {}",
            if i < chosen { "int8" } else { "int16" },
            100.0 * product.saved / saved,
            100.0 * product.error / error,
            product.name.trim_end_matches(".weight"),
        );
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_agree_where_the_same_one_stands_in_the_same_place() {
        let expected = [vec![0, 5, 6, 2], vec![0, 7, 2]];
        assert!((agreement(&expected, &expected) - 1.0).abs() < 1e-12);
        let found = [vec![0, 5, 9, 6, 2], vec![0, 7, 2]];
        assert!((agreement(&expected, &found) - 5.0 / 8.0).abs() < 1e-12);
    }

    #[test]
    fn the_table_has_shares_and_says_what_is_in_the_plan() {
        let product = |name: &str, saved, error| Product { name: name.to_owned(), saved, error };
        let products = [product("a.weight", 3.0, 0.1), product("b.weight", 1.0, 0.3)];
        let told = table(&products, 1);
        assert!(told.contains("int8    75.0 %   25.0 %  a\n"), "{told}");
        assert!(told.contains("int16   25.0 %   75.0 %  b\n"), "{told}");
    }
}
