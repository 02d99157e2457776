//! `florence prove`: holds a device, or other kernels, against the reference's answers and against
//! this machine's processor in float32. One JSON object a part.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use clap::ValueEnum;
use florence_engine::{
    Answer, Coordinates, Device, Florence, GenerateOptions, Job, Precision, PrepareOptions,
    Prepared,
    image::Orientation,
    serve::{
        self, Asker, Caches, Failure, Input, Keys, Part, PictureKey, Served, Turn, Wants, Watch,
        Work,
    },
};
use serde_json::{Value, json};

use crate::load::ModelArgs;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// What is proved
    #[arg(value_enum)]
    part: What,
    /// Of answers: engine/tests/fixtures
    #[arg(long)]
    goldens: Option<PathBuf>,
    /// Of answers: takes only every n-th
    #[arg(long, default_value_t = 1)]
    step: usize,
    /// Of throughput: how long, seconds
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Of throughput: threads that decode pictures
    #[arg(long, default_value_t = 8)]
    decoders: usize,
    /// Of throughput: most pictures in the batch
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens of an answer with made-up weights
    #[arg(long, default_value_t = 24)]
    tokens: usize,
    /// The picture of stages and throughput
    #[arg(long)]
    picture: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Ids and JSON of the goldens, alone and in batches
    Answers,
    /// The network's stages, and ids, beside the processor's
    Stages,
    /// Pictures a second, from the bytes of a picture to the answer
    Throughput,
}

const PICTURE: &[u8] = include_bytes!("../../models/tiny/samples/shapes.png");

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let shown = match args.part {
        What::Answers => answers(args)?,
        What::Stages => stages(args)?,
        What::Throughput => throughput(args)?,
    };
    println!("{shown}");
    Ok(())
}

fn picture(args: &Args) -> anyhow::Result<Vec<u8>> {
    match &args.picture {
        Some(path) => std::fs::read(path).with_context(|| path.display().to_string()),
        None => Ok(PICTURE.to_vec()),
    }
}

/// A golden answer, and what is asked for it.
struct Golden {
    prepared: Prepared,
    options: GenerateOptions,
    case: Value,
}

fn answers(args: &Args) -> anyhow::Result<Value> {
    let goldens = args.goldens.as_deref().context("--goldens is missing")?;
    let read = |name: &str| -> anyhow::Result<Value> {
        let path = goldens.join(name);
        let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
        Ok(serde_json::from_slice(&text)?)
    };
    let mut parts = Vec::new();
    let (tiny, pictures) = (args.model.load()?, goldens.join("pictures"));
    parts.push(compared(args, &tiny, &read("tiny.json")?["cases"], |case| {
        pictures.join(case["picture"].as_str().unwrap_or_default())
    })?);
    for case in read("random.json")?["cases"].as_array().into_iter().flatten() {
        let name = case["checkpoint"].as_str().unwrap_or_default();
        let random = args.model.load_directory(&goldens.join(name))?;
        let found = compared(args, &random, &case["answers"], |_| goldens.join("random.png"))?;
        parts.push(found);
    }
    Ok(json!({
        "part": "answers", "device": tiny.device(), "arithmetic": tiny.arithmetic(), "models": parts,
    }))
}

fn compared(
    args: &Args,
    florence: &Florence,
    cases: &Value,
    picture: impl Fn(&Value) -> PathBuf,
) -> anyhow::Result<Value> {
    let cases = cases.as_array().into_iter().flatten().step_by(args.step.max(1));
    let goldens = cases.map(|case| golden(florence, case, &picture(case)));
    let goldens = goldens.collect::<anyhow::Result<Vec<_>>>()?;
    let start = Instant::now();
    let alone = goldens.iter().map(|golden| florence.run_one(&golden.prepared, &golden.options));
    let alone = alone.collect::<Result<Vec<_>, _>>()?;
    let alone_ms = start.elapsed().as_millis();
    let mut together: Vec<Option<Answer>> = Vec::new();
    for batch in goldens.chunks(args.batch.max(1)) {
        let jobs = batch.iter().map(|Golden { prepared, options, .. }| Job { prepared, options });
        together.extend(florence.run(&jobs.collect::<Vec<_>>(), &|_| false)?);
    }
    let (mut ids, mut jsons, mut tokens, mut equal, mut same) = (0, 0, 0, 0, 0);
    let mut different = Vec::new();
    for (i, (golden, answer)) in goldens.iter().zip(&alone).enumerate() {
        let expected: Vec<u32> = serde_json::from_value(golden.case["token_ids"].clone())?;
        let is_equal = answer.token_ids == expected;
        ids += usize::from(is_equal);
        jsons += usize::from(answer.json == golden.case["answer"]);
        let found = &answer.token_ids;
        tokens += found.len().max(expected.len());
        equal += found.iter().zip(&expected).filter(|(found, expected)| found == expected).count();
        same += usize::from(together[i].as_ref().is_some_and(|other| other.token_ids == *found));
        if !is_equal && different.len() < 5 {
            different.push(
                json!({ "prompt": golden.case["prompt"], "found": found, "expected": expected }),
            );
        }
    }
    Ok(json!({
        "model": florence.name(), "cases": goldens.len(), "equal_ids": ids, "equal_json": jsons,
        "tokens": tokens, "equal_tokens": equal, "same_in_batches": same,
        "alone_ms": alone_ms, "different": different,
    }))
}

fn golden(florence: &Florence, case: &Value, picture: &Path) -> anyhow::Result<Golden> {
    let bytes = std::fs::read(picture).with_context(|| picture.display().to_string())?;
    let prompt = case["prompt"].as_str().unwrap_or_default();
    let prepared = florence.prepare(&bytes, prompt, &PrepareOptions::default())?;
    let number = |name: &str| case[name].as_u64().and_then(|number| usize::try_from(number).ok());
    let options = GenerateOptions {
        beams: number("beams"),
        max_new_tokens: number("max_new_tokens").or(Some(256)),
        no_repeat_ngram: number("no_repeat_ngram"),
        coordinates: Coordinates::Integer,
        ..GenerateOptions::default()
    };
    Ok(Golden { prepared, options, case: case.clone() })
}

/// Each stage's values, by name, and the ids of some answers.
struct Seen {
    stages: Vec<(String, Vec<f32>)>,
    ids: Vec<Vec<u32>>,
    ms: f64,
}

fn stages(args: &Args) -> anyhow::Result<Value> {
    let bytes = picture(args)?;
    let florence = args.model.load()?;
    let (device, arithmetic) = (florence.device().to_owned(), florence.arithmetic());
    let found = seen(args, &florence, &bytes)?;
    drop(florence);
    let expected = seen(args, &args.model.load_on(Device::Cpu, Precision::F32)?, &bytes)?;
    let differences = found.stages.iter().zip(&expected.stages).map(|((name, found), (_, exact))| {
        json!({ "stage": name, "largest": largest(found, exact), "cosine": cosine(found, exact) })
    });
    let differences: Vec<Value> = differences.collect();
    let equal = found.ids.iter().zip(&expected.ids).filter(|(found, exact)| found == exact).count();
    Ok(json!({
        "part": "stages", "device": device, "arithmetic": arithmetic, "stages": differences,
        "answers": found.ids.len(), "equal_ids": equal, "ms": found.ms, "cpu_ms": expected.ms,
        "found": found.ids, "expected": expected.ids,
    }))
}

fn seen(args: &Args, florence: &Florence, bytes: &[u8]) -> anyhow::Result<Seen> {
    let prepared = florence.prepare(bytes, "<OD>", &PrepareOptions::default())?;
    let (model, mut stages) = (florence.model(), Vec::new());
    let visual = model.visual_tokens(&[prepared.pixels()], |stage| stages.push(stage.clone()))?;
    let encoded = model.encode(&visual, prepared.prompt_ids())?;
    let logits = model.logits_after(&encoded, &[2, 0, 5])?;
    stages.extend([visual, encoded, logits]);
    let names = (0..stages.len()).map(|i| match i {
        0 => "pixels".to_owned(),
        1..=4 => format!("vision {i}"),
        5 => "projector".to_owned(),
        6 => "encoder".to_owned(),
        _ => "logits".to_owned(),
    });
    let values = stages.iter().map(|stage| stage.flatten_all()?.to_vec1::<f32>());
    let values = values.collect::<Result<Vec<_>, _>>()?;
    let stages = names.zip(values).collect();
    let start = Instant::now();
    let asked = [("<OD>", 1), ("<OD>", 3), ("<CAPTION>", 1), ("<OCR_WITH_REGION>", 3)];
    let ids = asked.into_iter().map(|(prompt, beams)| {
        let prepared = florence.prepare(bytes, prompt, &PrepareOptions::default())?;
        let options = GenerateOptions {
            beams: Some(beams),
            max_new_tokens: Some(args.tokens),
            ..GenerateOptions::default()
        };
        Ok(florence.run_one(&prepared, &options)?.token_ids)
    });
    let ids = ids.collect::<anyhow::Result<Vec<_>>>()?;
    Ok(Seen { stages, ids, ms: start.elapsed().as_secs_f64() * 1e3 })
}

/// The largest difference, in deviations of the exact values.
fn largest(found: &[f32], exact: &[f32]) -> f64 {
    let pairs = || found.iter().zip(exact).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let (count, mean) = (exact.len() as f64, pairs().map(|(_, b)| b).sum::<f64>());
    let mean = mean / count;
    let deviation = (pairs().map(|(_, b)| (b - mean).powi(2)).sum::<f64>() / count).sqrt();
    // A number that is none is as far away as can be.
    let most = pairs().map(|(a, b)| (a - b).abs()).map(|x| if x.is_nan() { f64::MAX } else { x });
    if found.len() == exact.len() { most.fold(0.0, f64::max) / deviation } else { f64::MAX }
}

fn cosine(found: &[f32], exact: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(found, exact) / (dot(found, found) * dot(exact, exact)).sqrt()
}

/// Counts who is answered.
struct Counted<'a> {
    answered: &'a AtomicUsize,
    failed: &'a AtomicUsize,
    tokens: &'a AtomicUsize,
}

impl Asker for Counted<'_> {
    fn wants(&self, _now: Instant) -> Wants {
        Wants::Answers
    }

    fn started(&self) {}

    fn generated(&self, _tokens: u32) {}

    fn answered(self, served: Served) {
        self.answered.fetch_add(1, Relaxed);
        let tokens: usize = served.answers.iter().map(|answer| answer.token_ids.len()).sum();
        self.tokens.fetch_add(tokens, Relaxed);
    }

    fn failed(self, _failure: Failure, _time: Duration) {
        self.failed.fetch_add(1, Relaxed);
    }
}

struct Room(usize);

impl Watch for Room {
    fn most(&self) -> usize {
        self.0
    }

    fn turned(&self, _turn: &Turn) {}

    fn stumbled(&self, _failure: &Failure) {}
}

fn throughput(args: &Args) -> anyhow::Result<Value> {
    let florence = args.model.load()?;
    let bytes = picture(args)?;
    let question = florence.question("<CAPTION>", PrepareOptions::default().prompts)?;
    let options = GenerateOptions {
        beams: Some(1),
        max_new_tokens: Some(args.tokens),
        ..GenerateOptions::default()
    };
    let counts = [const { AtomicUsize::new(0) }; 3];
    let [answered, failed, tokens] = &counts;
    let (work, inbox) = crossbeam_channel::bounded(2 * args.batch);
    let is_over = AtomicBool::new(false);
    let key = PictureKey::new("", &bytes, Orientation::AsStored);
    let mut warm = (0, Instant::now());
    let mut rates = Vec::new();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        for _ in 0..args.decoders {
            let (work, florence, bytes) = (work.clone(), &florence, &bytes);
            let (question, options, is_over) = (&question, &options, &is_over);
            scope.spawn(move || {
                while !is_over.load(Relaxed) {
                    let Ok(picture) = florence.picture(bytes, &PrepareOptions::default()) else {
                        return;
                    };
                    let part = Part {
                        keys: Keys::new(key, question, options),
                        question: question.clone(),
                        picture: 0,
                    };
                    let work_item = Work {
                        asker: Counted { answered, failed, tokens },
                        parts: vec![part],
                        inputs: vec![Input::Picture(picture)],
                        options: options.clone(),
                        is_shared: false,
                    };
                    if work.send(work_item).is_err() {
                        return;
                    }
                }
            });
        }
        drop(work);
        let (is_over, rates, warm) = (&is_over, &mut rates, &mut warm);
        scope.spawn(move || {
            // The first second warms up.
            std::thread::sleep(Duration::from_secs(1));
            *warm = (answered.load(Relaxed), Instant::now());
            for _ in 0..args.seconds {
                let before = answered.load(Relaxed);
                std::thread::sleep(Duration::from_secs(1));
                rates.push(answered.load(Relaxed) - before);
            }
            is_over.store(true, Relaxed);
        });
        let caches = Caches::new(0, 0);
        let served = serve::serve(&florence, &caches, &inbox, &Room(args.batch));
        served.map_err(|failure| anyhow!("the device is lost: {failure:?}"))
    })?;
    let (before, since) = warm;
    let all = answered.load(Relaxed);
    Ok(json!({
        "part": "throughput", "device": florence.device(), "arithmetic": florence.arithmetic(),
        "model": florence.name(), "batch": args.batch, "decoders": args.decoders,
        "picture_bytes": bytes.len(), "answered": all, "failed": failed.load(Relaxed),
        "tokens": tokens.load(Relaxed), "each_second": rates,
        "pictures_a_second": (all - before) as f64 / since.elapsed().as_secs_f64(),
    }))
}
