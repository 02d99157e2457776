//! `florence run`: answers for pictures, as text or as one JSON object a line. A picture that has
//! none is told of on stderr, and the next one goes on.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use florence_engine::Florence;
use serde_json::json;

use crate::{ask::AskArgs, load::ModelArgs};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Task token, such as `<OD>`, followed by its text where the task takes one
    #[arg(long)]
    prompt: String,
    #[command(flatten)]
    ask: AskArgs,
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
    florence.question(&args.prompt, args.ask.prompts)?;
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
    let bytes = std::fs::read(image).context("cannot read it")?;
    let prepared = florence.prepare(&bytes, &args.prompt, &args.ask.prepare())?;
    let answer = florence.run_one(&prepared, &args.ask.generate())?;
    let (shown, result) = (image.display(), answer.rounded(args.ask.decimals));
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
