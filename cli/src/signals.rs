//! Signals that end a run in order.

use std::{io, thread};

use florence_engine::Stop;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What asks a run to end.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// From now on they end nothing by themselves. Only within a runtime.
    pub(crate) fn new() -> io::Result<Self> {
        let [interrupt, terminate] = [SignalKind::interrupt(), SignalKind::terminate()].map(signal);
        Ok(Self { interrupt: interrupt?, terminate: terminate? })
    }

    pub(crate) async fn next(&mut self) {
        tokio::select! { _ = self.interrupt.recv() => {}, _ = self.terminate.recv() => {} }
    }
}

/// At the first signal the run ends in order; at the second, at once.
pub(crate) fn end_at(stop: &Stop) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stop = stop.clone();
    let guard = runtime.enter();
    let mut signals = Signals::new()?;
    drop(guard);
    thread::spawn(move || {
        runtime.block_on(async {
            loop {
                signals.next().await;
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
