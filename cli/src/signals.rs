//! Signals that end a run in order.

use std::thread;

use florence_engine::Stop;

/// At the first signal the run ends in order; at the second, at once.
pub(crate) fn end_at(stop: &Stop) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stop = stop.clone();
    let guard = runtime.enter();
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    drop(guard);
    thread::spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
                if stop.is_stopped() {
                    end_now();
                }
                stop.stop();
            }
        });
    });
    Ok(())
}

#[expect(clippy::exit, reason = "whoever asks twice does not want to wait")]
fn end_now() -> ! {
    const INTERRUPTED: i32 = 130;
    std::process::exit(INTERRUPTED)
}
