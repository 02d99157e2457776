//! Connections that look for a [`Stop`] while they wait for bytes.
//!
//! Transports are kept for later downloads, so the flag is not theirs: it belongs to the thread, for
//! as long as [`watching`] runs.

use std::{cell::RefCell, time::Duration};

use ureq::{
    Error,
    unversioned::transport::{
        Buffers, ConnectionDetails, Connector, Either, NextTimeout, RustlsConnector, TcpConnector,
        Transport,
    },
};

use crate::Stop;

/// How often a waiting download looks.
const LOOK: Duration = Duration::from_millis(100);

thread_local! {
    static STOP: RefCell<Stop> = RefCell::default();
}

/// Runs `f`; its downloads end soon after `stop` says so.
pub(super) fn watching<T>(stop: &Stop, f: impl FnOnce() -> T) -> T {
    let before = STOP.replace(stop.clone());
    let result = f();
    STOP.set(before);
    result
}

/// TCP, watched, then TLS: a handshake is interrupted too.
pub(super) fn connector() -> impl Connector<()> {
    ().chain(TcpConnector::default()).chain(Watch).chain(RustlsConnector::default())
}

/// A download was told to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(super) struct Interrupted;

#[derive(Debug)]
struct Watch;

impl<T: Transport> Connector<T> for Watch {
    type Out = Either<Watched<T>, ()>;

    fn connect(
        &self,
        _details: &ConnectionDetails<'_>,
        chained: Option<T>,
    ) -> Result<Option<Self::Out>, Error> {
        Ok(chained.map(|transport| Either::A(Watched(transport))))
    }
}

#[derive(Debug)]
struct Watched<T>(T);

impl<T: Transport> Transport for Watched<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.0.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.0.transmit_output(amount, timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let mut left = *timeout.after;
        loop {
            if STOP.with_borrow(Stop::is_stopped) {
                return Err(Error::Other(Box::new(Interrupted)));
            }
            let slice = left.min(LOOK);
            match self.0.await_input(NextTimeout { after: slice.into(), ..timeout }) {
                Err(Error::Timeout(_)) if left > slice => left -= slice,
                result => return result,
            }
        }
    }

    fn is_open(&mut self) -> bool {
        self.0.is_open()
    }

    fn is_tls(&self) -> bool {
        self.0.is_tls()
    }
}
