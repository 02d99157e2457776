//! `florence bench`: how long each stage takes.

use std::time::Instant;

use florence_engine::{Batch, Florence, GenerateOptions, Precision, PrepareOptions, Prepared};
use serde_json::json;

use crate::{limits::within, load::ModelArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Beams; 1 is greedy search
    #[arg(long, default_value_t = 3, value_parser = within::<usize>(1..=16))]
    beams: usize,
    /// Most tokens of an answer; made-up weights seldom end earlier
    #[arg(long, default_value_t = 32, value_parser = within::<usize>(1..=4096))]
    tokens: usize,
    /// Pictures that are decoded together
    #[arg(long, default_value_t = 1, value_parser = within::<usize>(1..=1024))]
    batch: usize,
    /// Measured rounds; one more is made first to warm up
    #[arg(long, default_value_t = 5, value_parser = within::<usize>(1..=1_000_000))]
    rounds: usize,
    /// Prompt
    #[arg(long, default_value = "<OD>")]
    prompt: String,
    /// Only compare the encoder's output with float32's
    #[arg(long)]
    cosine: bool,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
}

const PICTURE: &[u8] = include_bytes!("../../models/tiny/samples/shapes.png");

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.cosine {
        return cosine(args);
    }
    let start = Instant::now();
    let florence = args.model.load()?;
    let load_ms = start.elapsed().as_secs_f64() * 1e3;
    let options = GenerateOptions {
        beams: Some(args.beams),
        max_new_tokens: Some(args.tokens),
        ..GenerateOptions::default()
    };
    let mut stages = [const { Vec::new() }; 6];
    let mut tokens = 0;
    for round in 0..=args.rounds {
        let started = Instant::now();
        let mut times = [0.0; 6];
        let mut batch = Batch::new(&florence);
        let all = (0..args.batch)
            .map(|_| florence.prepare(PICTURE, &args.prompt, &PrepareOptions::default()))
            .collect::<Result<Vec<_>, _>>()?;
        times[0] += milliseconds(started);
        for (i, some) in all.chunks(florence.pictures_at_once()).enumerate() {
            let start = Instant::now();
            let pictures: Vec<_> = some.iter().map(Prepared::picture).collect();
            let visuals = florence.visuals(&pictures)?;
            // A device answers before it has computed.
            florence.check()?;
            times[1] += milliseconds(start);
            for (prepared, visual) in some.iter().zip(visuals) {
                batch.join(i, prepared.question(), &visual, &options)?;
            }
        }
        let (start, mut steps) = (Instant::now(), 0);
        while !batch.is_empty() {
            for (_, answer) in batch.step()? {
                tokens = answer.token_ids.len();
                times[2] += answer.timings.encoder;
            }
            steps += 1;
        }
        times[4] = milliseconds(start) / f64::from(steps);
        times[5] = milliseconds(started);
        // The decoder's keys and values of the encoded pictures, and all steps.
        times[3] = times[5] - times[0] - times[1] - times[2];
        if round > 0 {
            for (stage, time) in stages.iter_mut().zip(times) {
                stage.push(time);
            }
        }
    }
    let names = ["prepare", "vision", "encoder", "decoder", "decoder_step", "total"];
    let figures = names.into_iter().zip(stages.iter_mut().map(|times| Figures::of(times)));
    if args.json {
        let stages: serde_json::Map<_, _> = figures
            .map(|(name, Figures { median, least, most })| {
                (name.to_owned(), json!({ "median": median, "least": least, "most": most }))
            })
            .collect();
        let line = json!({
            "model": florence.name(), "device": florence.device(),
            "arithmetic": florence.arithmetic(), "beams": args.beams, "batch": args.batch, "tokens": tokens, "rounds": args.rounds, "load_ms": load_ms,
            "peak_mib": peak_mib(), "stages_ms": stages,
        });
        println!("{line}");
        return Ok(());
    }
    println!(
        "{} {}, {} beams, batch {}, {tokens} tokens, loaded in {load_ms:.0} ms, peak {} MiB",
        florence.name(),
        florence.arithmetic(),
        args.beams,
        args.batch,
        peak_mib()
    );
    println!("{:14}{:>10}{:>10}{:>10}", "ms", "median", "least", "most");
    for (name, Figures { median, least, most }) in figures {
        println!("{name:14}{median:10.1}{least:10.1}{most:10.1}");
    }
    Ok(())
}

/// Prints the cosine between encoder outputs: of the whole, and of the token that differs most.
fn cosine(args: &Args) -> anyhow::Result<()> {
    let encode = |florence: &Florence| -> anyhow::Result<Vec<Vec<f32>>> {
        let prepared = florence.prepare(PICTURE, &args.prompt, &PrepareOptions::default())?;
        let model = florence.model();
        let visual = model.visual_tokens(&[prepared.pixels()], |_| {})?;
        Ok(model.encode(&visual, prepared.prompt_ids())?.squeeze(0)?.to_vec2()?)
    };
    let florence = args.model.load()?;
    let (name, found) = (florence.arithmetic(), encode(&florence)?);
    drop(florence);
    let expected = encode(&args.model.load_in(Precision::F32)?)?;
    let cosine = |x: &[f32], y: &[f32]| {
        let dot = |x: &[f32], y: &[f32]| -> f64 {
            x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
        };
        dot(x, y) / (dot(x, x) * dot(y, y)).sqrt()
    };
    let tokens = found.iter().zip(&expected).map(|(x, y)| cosine(x, y)).fold(1.0, f64::min);
    let whole = cosine(&found.concat(), &expected.concat());
    println!(
        "{name}: cosine of the encoder's output to float32's {whole:.7}, least of a token {tokens:.7}"
    );
    Ok(())
}

struct Figures {
    median: f64,
    least: f64,
    most: f64,
}

impl Figures {
    fn of(times: &mut [f64]) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |i: usize| times.get(i).copied().unwrap_or(f64::NAN);
        Self { median: at(times.len() / 2), least: at(0), most: at(times.len().wrapping_sub(1)) }
    }
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// The most memory that this process has had; 0 where the system does not tell.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or_default() / 1024
}
