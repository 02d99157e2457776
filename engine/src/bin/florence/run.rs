//! `florence run`: answers for pictures, as text or as one JSON object a line.

use std::path::PathBuf;

use anyhow::Context;
use florence_engine::{Coordinates, GenerateOptions, PrepareOptions, image::Orientation};
use serde_json::json;

use crate::load::ModelArgs;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Task token, such as `<OD>`, followed by its text where the task takes one
    #[arg(long)]
    prompt: String,
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
    let prepare = PrepareOptions {
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
    for image in &args.images {
        let shown = image.display();
        let bytes = std::fs::read(image).with_context(|| format!("cannot read {shown}"))?;
        let prepared =
            florence.prepare(&bytes, &args.prompt, &prepare).with_context(|| shown.to_string())?;
        let answer = florence.run_one(&prepared, &generate).with_context(|| shown.to_string())?;
        if args.json {
            let line = json!({
                "image": shown.to_string(),
                "prompt": args.prompt,
                "model": florence.name(),
                "text": answer.text,
                "token_ids": answer.token_ids,
                "answer": answer.json,
                "scores": answer.scores,
                "timings_ms": answer.timings,
            });
            println!("{line}");
        } else {
            println!("{shown}: {}", answer.json);
        }
    }
    Ok(())
}
