//! `florence run`: answers for pictures, as text or as one JSON object a line. A picture that has
//! none is told of on stderr, and the next one goes on.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use florence_engine::{
    Answer, Florence, GenerateOptions,
    chain::{Chain, Link, Step, Told},
    generate::Sampling,
    image::decode,
};
use serde_json::json;

use crate::{ask::AskArgs, limits::within, load::ModelArgs};

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
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = within::<usize>(1..=256))]
    most_regions: usize,
    #[command(flatten)]
    ask: AskArgs,
    /// Tell so many of the best beams, with their scores
    #[arg(long, value_name = "N", conflicts_with_all = ["steps", "drawn"], value_parser = within::<usize>(1..=16))]
    nbest: Option<usize>,
    #[command(flatten)]
    drawn: Drawn,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Pictures
    #[arg(required = true)]
    images: Vec<PathBuf>,
}

/// Tokens are drawn by chance, instead of a search, where one of these is given.
#[derive(clap::Args)]
#[group(id = "drawn", multiple = true, conflicts_with_all = ["beams", "length_penalty"])]
struct Drawn {
    /// Draw tokens by chance, likely ones more often the lower it is (default, where tokens are drawn: 1)
    #[arg(long, value_name = "T", value_parser = within::<f64>(0.01..=100.0))]
    temperature: Option<f64>,
    /// Draw from so many of the likeliest tokens; 0 for all (default: 50)
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Draw from the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", value_parser = within::<f64>(0.01..=1.0))]
    top_p: Option<f64>,
    /// Draw; the same seed draws the same tokens (default: 0)
    #[arg(long)]
    seed: Option<u64>,
}

impl Drawn {
    fn sampling(&self) -> Option<Sampling> {
        let Self { temperature, top_k, top_p, seed } = *self;
        Sampling::of(temperature, top_k, top_p, seed)
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.ask.check()?;
    let florence = args.model.load()?;
    if let Some(note) = florence.note() {
        eprintln!("{note} --to DIRECTORY, then --model DIRECTORY");
    }
    // What is wrong with it is wrong for all pictures.
    florence.question(&args.prompt, args.ask.prompts)?;
    let chain = chain(args);
    chain.check(args.ask.prompts)?;
    let is_cut = chain.steps.iter().any(|step| step.link == Link::Crop);
    ensure!(is_cut || args.margin == 0, "--margin is for CROP");
    let (beams, wanted) = (florence.beams(&generate(args)), args.nbest.unwrap_or_default());
    if wanted > beams {
        bail!("--nbest {wanted} is more than there are beams, {beams}");
    }
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

fn generate(args: &Args) -> GenerateOptions {
    GenerateOptions { n_best: args.nbest, sampling: args.drawn.sampling(), ..args.ask.generate() }
}

fn answer(florence: &Florence, args: &Args, image: &Path) -> anyhow::Result<()> {
    let prepare = args.ask.prepare();
    let generate = generate(args);
    let bytes = std::fs::read(image).context("cannot read it")?;
    if !args.steps.is_empty() {
        let picture = decode(&bytes, &prepare.limits, prepare.orientation)?;
        let run = florence.run_chain(&picture, chain(args), args.ask.prompts, &generate)?;
        print(florence, args, image, (&run.told(args.ask.decimals), None));
        return Ok(());
    }
    let prepared = florence.prepare(&bytes, &args.prompt, &prepare)?;
    let answer = florence.run_one(&prepared, &generate)?;
    let told = Told {
        json: answer.rounded(args.ask.decimals),
        text: json!(answer.text),
        scores: json!(answer.scores),
        n_best: None,
        tokens: answer.token_ids.len(),
        size: answer.size,
    };
    print(florence, args, image, (&told, Some(&answer)));
    Ok(())
}

/// What is told, with the rest of the answer if there is just one.
fn print(florence: &Florence, args: &Args, image: &Path, (told, answer): (&Told, Option<&Answer>)) {
    let (shown, (width, height)) = (image.display(), told.size);
    let best = answer.map_or(&[][..], |answer| &answer.n_best);
    if !args.json && !best.is_empty() {
        for one in best {
            println!("{shown}: {:.4} {}", one.score, one.rounded(args.ask.decimals));
        }
        return;
    }
    if !args.json {
        println!("{shown}: {}", told.json);
        return;
    }
    let mut line = json!({
        "image": shown.to_string(),
        "prompt": args.prompt,
        "model": florence.name(),
        "width": width,
        "height": height,
        "text": told.text,
        "answer": told.json,
        "scores": told.scores,
    });
    if let Some(answer) = answer {
        line["token_ids"] = json!(answer.token_ids);
        line["timings_ms"] = json!(answer.timings);
    }
    if !best.is_empty() {
        line["nbest"] = best.iter().map(|one| one.told(args.ask.decimals)).collect();
    }
    println!("{line}");
}

fn chain(args: &Args) -> Chain {
    Chain {
        prompts: vec![args.prompt.clone()],
        steps: args.steps.clone(),
        margin: args.margin,
        most_regions: args.most_regions,
    }
}
