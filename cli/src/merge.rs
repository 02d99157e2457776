//! `florence merge`: a model with an adapter merged in, as a checkpoint of its own.

use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory of the model
    model: PathBuf,
    /// Directory of the PEFT adapter
    adapter: PathBuf,
    /// Directory to write, which must not be there
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let Args { model, adapter, out } = args;
    let changed = florence_engine::model::merge(model, adapter, out)?;
    tellln!("{changed} weights changed; the model is in {}", out.display());
    Ok(())
}
