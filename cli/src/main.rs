//! `florence`: the engine on the command line, and a page about servers.

use std::{
    fmt,
    io::{ErrorKind, Write, stdout},
    process::exit,
};

/// As the standard library's, but a reader that has gone ends the program without a panic.
macro_rules! println {
    ($($text:tt)*) => { crate::print(format_args!($($text)*)) };
}

/// The same to stderr; the work goes on whether or not somebody reads of it.
macro_rules! eprintln {
    ($($text:tt)*) => { crate::tell(&mut std::io::stderr(), format_args!($($text)*)) };
}

/// As [`println`], of work that is done whether or not somebody reads of it.
macro_rules! tellln {
    ($($text:tt)*) => { crate::tell(&mut std::io::stdout(), format_args!($($text)*)) };
}

mod agree;
mod ask;
mod asked;
mod bench;
mod convert;
mod doctor;
mod draw;
mod formats;
mod label;
mod limits;
mod load;
mod merge;
mod prove;
mod pull;
mod run;
mod servers;
mod signals;
mod source;
mod top;
mod tune;
mod web;
mod whole;

use clap::{Parser, Subcommand};

/// Florence-2 on the command line.
#[derive(Parser)]
#[command(name = "florence", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer a prompt for pictures.
    Run(run::Args),
    /// Answer prompts about a folder, a bucket, an archive or a list of pictures.
    Label(Box<label::Args>),
    /// Write the output of label in another format.
    Convert(convert::Args),
    /// Compare the answers of other precisions with those of float32, on pictures of your own.
    Agree(agree::Args),
    /// Find out which products of a model may be int8, on pictures of your own.
    Tune(tune::Args),
    /// Download a checkpoint from the Hugging Face hub.
    Pull(pull::Args),
    /// Merge a PEFT adapter into a model, and write that as a checkpoint of its own.
    Merge(merge::Args),
    /// Draw an answer's boxes, quadrilaterals and polygons onto its picture.
    Draw(draw::Args),
    /// Measure how long each stage takes.
    Bench(bench::Args),
    /// Serve a page about servers, and figures for Prometheus.
    Web(web::Args),
    /// Show how servers do, in a terminal.
    Top(top::Args),
    /// Hold a device against the reference's answers and this machine's processor.
    Prove(prove::Args),
    /// Show what this machine offers, and check a model.
    Doctor(doctor::Args),
}

/// Writes a line of an answer. To `head`, which has seen enough, nothing is left to say.
#[expect(clippy::exit, reason = "nobody is there to hear of it")]
fn print(text: fmt::Arguments<'_>) {
    let mut out = stdout();
    let Err(error) = writeln!(out, "{text}").and_then(|()| out.flush()) else { return };
    if error.kind() == ErrorKind::BrokenPipe {
        exit(0);
    }
    eprintln!("Error: cannot write to standard output: {error}");
    exit(1);
}

fn tell(out: &mut dyn Write, text: fmt::Arguments<'_>) {
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Label(args) => label::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Agree(args) => agree::run(&args),
        Command::Tune(args) => tune::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Draw(args) => draw::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Web(args) => web::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Prove(args) => prove::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    }
}
