//! `florence`: the engine on the command line, without Redis.
#![expect(clippy::print_stdout, reason = "a command-line tool")]

mod bench;
mod doctor;
mod draw;
mod load;
mod pull;
mod run;

use clap::{Parser, Subcommand};

/// Florence-2 on the command line.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer a prompt for pictures.
    Run(run::Args),
    /// Download a checkpoint from the Hugging Face hub.
    Pull(pull::Args),
    /// Draw an answer's boxes, quadrilaterals and polygons onto its picture.
    Draw(draw::Args),
    /// Measure how long each stage takes.
    Bench(bench::Args),
    /// Show what this machine offers, and check a model.
    Doctor(doctor::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Draw(args) => draw::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    }
}
