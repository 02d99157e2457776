//! `florence run`: answers for pictures, as text or as one JSON object a line. A picture that has
//! none is told of on stderr, and the next one goes on.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use florence_engine::{
    Coordinates, Decimals, Florence, GenerateOptions, PrepareOptions,
    chain::{Chain, Step, Told},
    image::{Orientation, decode},
    prompt::Prompts,
};
use serde_json::json;

use crate::load::ModelArgs;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Task token, such as `<OD>`, followed by its text where the task takes one
    #[arg(long)]
    prompt: String,
    /// What is asked then: THEN, EACH or CROP and a prompt, as in `EACH <REGION_TO_OCR>`; up to three
    #[arg(long = "step", value_name = "STEP")]
    steps: Vec<Step>,
    /// How much more than a region CROP cuts out on each side, in percent of its size
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=100))]
    margin: u32,
    /// Most regions that a step asks about
    #[arg(long, value_name = "N", default_value_t = 64)]
    most_regions: usize,
    /// Take the fifteen tasks only, or give the model any other text as it is
    #[arg(long, value_name = "tasks|any", default_value = "tasks")]
    prompts: Prompts,
    /// Beams; 1 is greedy search (default: the checkpoint's)
    #[arg(long)]
    beams: Option<usize>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 1024)]
    max_new_tokens: usize,
    /// No n-gram of this length may occur twice; 0 for no such rule (default: the checkpoint's)
    #[arg(long)]
    no_repeat_ngram: Option<usize>,
    /// Exponent of the length that log-probabilities are divided by (default: the checkpoint's)
    #[arg(long)]
    length_penalty: Option<f32>,
    /// Coordinates as floats, or truncated as newer transformers give them
    #[arg(long, value_name = "float|int", default_value = "float")]
    coordinates: Coordinates,
    /// Digits after the point of coordinates, 0 to 9; all of them, as the reference has it
    #[arg(long, value_name = "all|N", default_value = "all")]
    decimals: Decimals,
    /// Turn pictures as their EXIF tag says
    #[arg(long)]
    exif: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Pictures
    #[arg(required = true)]
    images: Vec<PathBuf>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let florence = args.model.load()?;
    if let Some(note) = florence.note() {
        eprintln!("{note} --to DIRECTORY, then --model DIRECTORY");
    }
    // What is wrong with it is wrong for all pictures.
    florence.question(&args.prompt, args.prompts)?;
    chain(args).check(args.prompts)?;
    let failed = args.images.iter().filter(|image| {
        let answered = answer(&florence, args, image);
        if let Err(error) = &answered {
            eprintln!("{}: {error:#}", image.display());
        }
        answered.is_err()
    });
    match failed.count() {
        0 => Ok(()),
        failed => bail!("{failed} of {} pictures have no answer", args.images.len()),
    }
}

fn answer(florence: &Florence, args: &Args, image: &Path) -> anyhow::Result<()> {
    let prepare = PrepareOptions {
        prompts: args.prompts,
        orientation: if args.exif { Orientation::Exif } else { Orientation::AsStored },
        ..PrepareOptions::default()
    };
    let generate = GenerateOptions {
        beams: args.beams,
        max_new_tokens: Some(args.max_new_tokens),
        no_repeat_ngram: args.no_repeat_ngram,
        length_penalty: args.length_penalty,
        coordinates: args.coordinates,
    };
    let bytes = std::fs::read(image).context("cannot read it")?;
    if !args.steps.is_empty() {
        let picture = decode(&bytes, &prepare.limits, prepare.orientation)?;
        let run = florence.run_chain(&picture, chain(args), args.prompts, &generate)?;
        print_chain(florence, args, image, &run.told(args.decimals));
        return Ok(());
    }
    let prepared = florence.prepare(&bytes, &args.prompt, &prepare)?;
    let answer = florence.run_one(&prepared, &generate)?;
    let (shown, result) = (image.display(), answer.rounded(args.decimals));
    if args.json {
        let (width, height) = answer.size;
        let line = json!({
            "image": shown.to_string(),
            "prompt": args.prompt,
            "model": florence.name(),
            "width": width,
            "height": height,
            "text": answer.text,
            "token_ids": answer.token_ids,
            "answer": result,
            "scores": answer.scores,
            "timings_ms": answer.timings,
        });
        println!("{line}");
    } else {
        println!("{shown}: {result}");
    }
    Ok(())
}

fn chain(args: &Args) -> Chain {
    Chain {
        prompts: vec![args.prompt.clone()],
        steps: args.steps.clone(),
        margin: args.margin,
        most_regions: args.most_regions,
    }
}

fn print_chain(florence: &Florence, args: &Args, image: &Path, told: &Told) {
    let (shown, (width, height)) = (image.display(), told.size);
    if !args.json {
        println!("{shown}: {}", told.json);
        return;
    }
    let line = json!({
        "image": shown.to_string(),
        "prompt": args.prompt,
        "model": florence.name(),
        "width": width,
        "height": height,
        "text": told.text,
        "answer": told.json,
        "scores": told.scores,
    });
    println!("{line}");
}
