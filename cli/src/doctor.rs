//! `florence doctor`: what this machine offers, and whether a model loads.

use florence_engine::{Cpu, LoadOptions};

use crate::load::FilesArgs;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    files: FilesArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    println!("cores         {cores}");
    println!("cpu features  {}", cpu_features().join(" "));
    let kernels: Vec<_> = Cpu::available().map(Cpu::name).collect();
    println!("kernels       {}", kernels.join(" "));
    match florence_engine::cuda_devices() {
        Ok(devices) if devices.is_empty() => println!("cuda          no devices"),
        Ok(devices) => {
            for (n, device) in devices.iter().enumerate() {
                println!("cuda:{n:<9}{device}");
            }
        }
        Err(problem) => println!("cuda          {problem}"),
    }
    let start = std::time::Instant::now();
    let florence = args.files.load(LoadOptions::default())?;
    println!(
        "model         {} loads in {} ms, answers of up to {} tokens",
        florence.name(),
        start.elapsed().as_millis(),
        florence.max_new_tokens()
    );
    if let Some(note) = florence.note() {
        println!("note          {note}");
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    let features = [
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("fma", std::is_x86_feature_detected!("fma")),
        ("avx512f", std::is_x86_feature_detected!("avx512f")),
        ("avx512bf16", std::is_x86_feature_detected!("avx512bf16")),
        ("avx512vnni", std::is_x86_feature_detected!("avx512vnni")),
    ];
    features.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<&'static str> {
    vec![std::env::consts::ARCH]
}
