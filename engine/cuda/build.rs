//! Compiles the kernels: for the host always, for GPUs with the feature `cuda`.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// What the GPU program has code for: A100 and its relatives, H100 and H200, and PTX for what came
/// after the first.
const GENERATIONS: [&str; 3] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_80,code=compute_80",
];

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    for_the_host();
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        println!("cargo::rerun-if-env-changed=CUDA_HOME");
        for_gpus();
    }
}

/// Products are not fused with sums, and `-O2` is not left to the profile, so that the bits are the
/// same in every build.
fn for_the_host() {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flag("-ffp-contract=off")
        .flag("-fno-strict-aliasing")
        // Jumps between stacks are no overflow.
        .flag("-U_FORTIFY_SOURCE")
        .flag("-Wno-unknown-pragmas")
        .flag("-Wno-unused-parameter")
        .file("kernels/host.cpp")
        .compile("florence_cuda_host");
}

/// A kernel that spills registers is an error.
fn for_gpus() {
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let nvcc = home.unwrap_or_else(|| PathBuf::from("nvcc"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("kernels.fatbin");
    let mut command = Command::new(&nvcc);
    command.args(["-std=c++17", "-O3", "-fatbin"]);
    command.args(GENERATIONS.iter().flat_map(|generation| ["-gencode", generation]));
    command.args(["-Xptxas", "--warn-on-spills,--warning-as-error", "-o"]);
    let status = command.arg(out).arg("kernels/all.cu").status();
    let compiled = matches!(&status, Ok(status) if status.success());
    assert!(compiled, "{} (of CUDA_HOME, or on PATH): {status:?}", nvcc.display());
}
