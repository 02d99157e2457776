//! Connections and look-ups of names that look for a [`Stop`] while they wait, and end in time.
//!
//! Transports are kept for later downloads, so the flag is not theirs: it belongs to the thread, for
//! as long as [`watching`] runs.

use std::{
    cell::RefCell,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use ureq::{
    Error,
    config::Config,
    http::Uri,
    unversioned::{
        resolver::{ResolvedSocketAddrs, Resolver},
        transport::{
            Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, RustlsConnector,
            Transport, time,
        },
    },
};

use crate::Stop;

/// How often whoever waits looks.
const LOOK: Duration = Duration::from_millis(100);

/// Most look-ups and connections that are waited for, or that nobody waits for any more.
const APART: usize = 64;

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
    Connect.chain(RustlsConnector::default())
}

/// A download was told to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(super) struct Interrupted;

/// How long something may take.
#[derive(Debug, Clone, Copy)]
struct Wait {
    end: Instant,
    timeout: NextTimeout,
}

impl Wait {
    fn new(timeout: NextTimeout) -> Self {
        // What has no end would overflow.
        Self { end: Instant::now() + (*timeout.after).min(Duration::from_hours(24)), timeout }
    }

    fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// An error once the wait is over.
    fn check(&self) -> Result<(), Error> {
        if STOP.with_borrow(Stop::is_stopped) {
            Err(Error::Other(Box::new(Interrupted)))
        } else if self.left().is_zero() {
            Err(Error::Timeout(self.timeout.reason))
        } else {
            Ok(())
        }
    }
}

/// Runs what cannot be interrupted on a thread of its own, which is left alone once the wait is over.
fn apart<T: Send + 'static>(
    wait: Wait,
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let place = Place::take(wait)?;
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::Builder::new().name("florence-net".to_owned()).spawn(move || {
        let _place = place;
        let _ = sender.send(f());
    })?;
    loop {
        wait.check()?;
        match receiver.recv_timeout(wait.left().min(LOOK)) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(Error::ConnectionFailed),
        }
    }
}

/// A place among the threads of [`apart`]: whoever asks and cancels all the time must not have
/// more and more of them.
struct Place;

static TAKEN: AtomicUsize = AtomicUsize::new(0);

impl Place {
    fn take(wait: Wait) -> Result<Self, Error> {
        let one_more = |taken| (taken < APART).then_some(taken + 1);
        while TAKEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_err() {
            wait.check()?;
            thread::sleep(LOOK);
        }
        Ok(Self)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        TAKEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A resolver whose answer is waited for like everything else.
#[derive(Debug)]
pub(super) struct Watched<R>(Arc<R>);

impl<R> Watched<R> {
    pub(super) fn new(resolver: R) -> Self {
        Self(Arc::new(resolver))
    }
}

impl<R: Resolver> Resolver for Watched<R> {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        let (resolver, uri, config) = (Arc::clone(&self.0), uri.clone(), config.clone());
        // With a timeout, it would start a thread as well.
        let none = NextTimeout { after: time::Duration::NotHappening, ..timeout };
        apart(Wait::new(timeout), move || resolver.resolve(&uri, &config, none))?
    }
}

#[derive(Debug)]
struct Connect;

impl<In: Transport> Connector<In> for Connect {
    type Out = Tcp;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        _chained: Option<In>,
    ) -> Result<Option<Tcp>, Error> {
        let (wait, addresses) = (Wait::new(details.timeout), details.addrs.to_vec());
        let stream =
            apart(wait, move || connect(&addresses, wait))?.map_err(|error| {
                match error.kind() {
                    ErrorKind::TimedOut => Error::Timeout(details.timeout.reason),
                    _ => error.into(),
                }
            })?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LOOK))?;
        stream.set_write_timeout(Some(LOOK))?;
        let (input, output) =
            (details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(Tcp { stream, buffers: LazyBuffers::new(input, output) }))
    }
}

/// The first address that answers; one that does not leaves half of the time to the others.
fn connect(addresses: &[SocketAddr], wait: Wait) -> io::Result<TcpStream> {
    let mut result = Err(ErrorKind::ConnectionRefused.into());
    for (i, address) in addresses.iter().enumerate() {
        let is_last = i + 1 == addresses.len();
        let time = if is_last { wait.left() } else { wait.left() / 2 };
        result = TcpStream::connect_timeout(address, time.max(Duration::from_millis(10)));
        if result.is_ok() {
            break;
        }
    }
    result
}

/// A connection; its socket gives up after [`LOOK`], and is asked again.
#[derive(Debug)]
struct Tcp {
    stream: TcpStream,
    buffers: LazyBuffers,
}

/// Whether a socket has just had nothing to do.
fn is_pause(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

impl Transport for Tcp {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let (wait, mut rest) = (Wait::new(timeout), &self.buffers.output()[..amount]);
        while !rest.is_empty() {
            wait.check()?;
            match self.stream.write(rest) {
                Ok(0) => return Err(io::Error::from(ErrorKind::WriteZero).into()),
                Ok(count) => rest = &rest[count..],
                Err(error) if is_pause(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let wait = Wait::new(timeout);
        loop {
            wait.check()?;
            match self.stream.read(self.buffers.input_append_buf()) {
                Ok(count) => {
                    self.buffers.input_appended(count);
                    return Ok(count > 0);
                }
                Err(error) if is_pause(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A connection that waits for the next request has nothing to say.
    fn is_open(&mut self) -> bool {
        let is_silent = |stream: &TcpStream| {
            stream.set_nonblocking(true)?;
            let peeked = stream.peek(&mut [0]);
            stream.set_nonblocking(false)?;
            io::Result::Ok(peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock))
        };
        is_silent(&self.stream).unwrap_or(false)
    }
}
