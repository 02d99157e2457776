//! `florence convert`: the output of `florence label` in other formats.

use std::path::PathBuf;

use anyhow::ensure;
use florence_engine::Stop;

use crate::{
    formats::{self, FormatArgs},
    signals,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Outputs of label; shards in their order
    #[arg(required = true, value_name = "JSONL")]
    labels: Vec<PathBuf>,
    /// Write over files that are there and say something else
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    formats: FormatArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.formats.check()?;
    ensure!(!args.formats.is_empty(), "which format? --format {}", formats::names());
    for path in &args.labels {
        let is_file = path.metadata().map_or(true, |it| it.is_file());
        ensure!(is_file, "{} is no file, which could be read twice", path.display());
    }
    let stop = Stop::default();
    signals::end_at(&stop)?;
    formats::write(&args.labels, &args.labels[0], &args.formats, args.overwrite, &stop)
}
