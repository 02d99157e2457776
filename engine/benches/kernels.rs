//! Every kernel on its own: `cargo bench -p florence-engine --features bench`.
//!
//! Criterion's `elem/s` are floating-point operations a second; the peak of one core is printed
//! first. `FLORENCE_BENCH_THREADS` sets the threads (default 1).
#![expect(clippy::print_stdout, reason = "the peaks")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use florence_engine::{Cpu, bench};

fn kernels(criterion: &mut Criterion) {
    let threads = std::env::var("FLORENCE_BENCH_THREADS").ok().and_then(|n| n.parse().ok());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(1)).build();
    let pool = pool.expect("threads for the bench");
    for cpu in Cpu::available() {
        let peak = pool.install(|| bench::peak(cpu)) / 1e9;
        println!("{}: peak of one core {peak:.0} GFLOP/s in float32 registers", cpu.name());
        if cpu.name() == "scalar" {
            continue;
        }
        for precision in bench::precisions(cpu) {
            let mut group = criterion.benchmark_group(format!("{} {precision}", cpu.name()));
            group.sample_size(10);
            for case in pool.install(|| bench::cases(cpu, precision)) {
                group.throughput(Throughput::Elements(case.flops));
                group.bench_function(&case.name, |bencher| {
                    pool.install(|| bencher.iter(|| (case.run)()));
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
