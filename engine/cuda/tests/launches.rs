//! What a launch on the host refuses and finds out.
#![expect(unsafe_code, reason = "kernels work on pointers")]

use florence_cuda::{Arg, geometry, host};

/// What is said of a faulty kernel of one block, which asks for as many floats as threads, less
/// `short`.
fn faulty(kernel: &str, short: u32) -> String {
    let mut out = [0.0f32; 64];
    let arg = Arg::Pointer(out.as_mut_ptr().cast_const().cast());
    // SAFETY: the kernels write at most an element for each of the 64 threads.
    let result = unsafe { host::launch(kernel, [1; 3], 64, (64 - short) * 4, &[arg]) };
    result.expect_err("a fault").to_string()
}

#[test]
fn threads_that_wait_in_vain_are_found() {
    let error = faulty("waits_in_vain_f32", 0);
    assert_eq!(
        error,
        "kernel waits_in_vain_f32: threads wait at a barrier for threads that have ended"
    );
    let error = faulty("lacks_a_lane_f32", 0);
    assert!(error.contains("lanes that wait elsewhere or have ended"), "{error}");
}

#[test]
fn writes_behind_shared_memory_are_found() {
    assert!(faulty("writes_behind_f32", 1).contains("behind its shared memory"));
}

#[test]
fn pointers_that_are_not_aligned_are_found() {
    assert!(faulty("reads_askew_f32", 0).contains("not aligned"));
}

#[test]
fn a_race_gives_another_result_backwards() {
    let mut out = [[0.0f32; 64]; 2];
    let [forwards, backwards] =
        out.each_mut().map(|out| [Arg::Pointer(out.as_mut_ptr().cast_const().cast())]);
    // SAFETY: the kernel writes an element for each of the 64 threads.
    let results = unsafe {
        [
            host::launch("races_f32", [1; 3], 64, 256, &forwards),
            host::launch_backwards("races_f32", [1; 3], 64, 256, &backwards),
        ]
    };
    assert_eq!(results, [Ok(()), Ok(())]);
    assert_ne!(out[0].map(f32::to_bits), out[1].map(f32::to_bits));
}

#[test]
fn launches_that_a_driver_would_refuse_are_refused() {
    let mut x = [0.0f32; 8];
    let bias = [0.0f32; 8];
    let pointers =
        [Arg::Pointer(x.as_mut_ptr().cast_const().cast()), Arg::Pointer(bias.as_ptr().cast())];
    let good = [pointers[0], pointers[1], Arg::Size(1), Arg::Int(8)];
    let launch = |name: &str, grid, block, shared, args: &[Arg]| {
        // SAFETY: the arguments that the kernel takes are a row of eight elements.
        unsafe { host::launch(name, grid, block, shared, args) }
    };
    let at = geometry::bias_gelu(1, 8);
    assert_eq!(launch("bias_gelu_f32", at.grid, at.block, at.shared, &good), Ok(()));
    let refused = [
        launch("bias_gelu", at.grid, at.block, 0, &good),
        launch("bias_gelu_f32\0", at.grid, at.block, 0, &good),
        launch("bias_gelu_f32", [0, 1, 1], at.block, 0, &good),
        launch("bias_gelu_f32", [1, 65536, 1], at.block, 0, &good),
        launch("bias_gelu_f32", at.grid, 0, 0, &good),
        launch("bias_gelu_f32", at.grid, 257, 0, &good),
        launch("bias_gelu_f32", at.grid, 288, 0, &good),
        launch("bias_gelu_f32", at.grid, at.block, 48 * 1024 + 1, &good),
        launch("bias_gelu_f32", at.grid, at.block, 0, &good[..3]),
        launch("bias_gelu_f32", at.grid, at.block, 0, &[good[0], good[1], good[3], good[2]]),
    ];
    for (i, result) in refused.iter().enumerate() {
        assert!(result.is_err(), "launch {i} was not refused");
    }
}

#[test]
fn what_is_beyond_the_driver_is_not_cut() {
    assert_eq!(geometry::top_k(usize::MAX).grid[0], u32::MAX);
}

#[cfg(feature = "cuda")]
#[test]
fn the_gpu_program_has_every_kernel() {
    use florence_cuda::FATBIN;
    assert!(FATBIN.as_ptr().addr().is_multiple_of(16));
    let both = [
        "add_bias",
        "bias_gelu",
        "bias_residual",
        "channel_apply",
        "channel_scores",
        "embed",
        "history_append",
        "history_attention",
        "layer_norm",
        "patches",
        "sequence_attention",
        "window_attention",
    ];
    let both = both.iter().flat_map(|name| [format!("{name}_f32"), format!("{name}_bf16")]);
    let others = [
        "channel_softmax_f32",
        "depthwise_f32",
        "embed_f16",
        "product_f32",
        "product_few_f32",
        "top_k_f32",
    ];
    for name in both.chain(others.map(str::to_owned)) {
        let entry = format!(".text.{name}\0");
        assert!(FATBIN.windows(entry.len()).any(|at| at == entry.as_bytes()), "{name} is missing");
    }
}
