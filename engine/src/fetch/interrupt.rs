//! Connections and look-ups of names that look for a [`Stop`] while they wait, and end in time.
//!
//! Transports are kept for later downloads, so the flag is not theirs: it belongs to the thread, for
//! as long as [`watching`] runs. So does what a download waits for, and whether it has made a
//! connection of its own.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use ureq::{
    Error,
    config::Config,
    http::Uri,
    unversioned::{
        resolver::{ResolvedSocketAddrs, Resolver},
        transport::{
            Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, Transport,
            time,
        },
    },
};

use super::Phase;
use crate::Stop;

/// How often whoever waits looks.
const LOOK: Duration = Duration::from_millis(100);

/// Most look-ups and connections that are waited for, or that nobody waits for any more; of all, and
/// of one asker.
const APART: usize = 256;
const APART_OF_ONE: usize = 64;

thread_local! {
    static STOP: RefCell<Stop> = RefCell::default();
    static ASKER: Cell<u64> = const { Cell::new(0) };
    static PHASE: Cell<Phase> = const { Cell::new(Phase::Name) };
    static HAS_CONNECTED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`; its downloads end soon after `stop` says so, and are counted as this asker's.
pub(super) fn watching<T>(stop: &Stop, asker: u64, f: impl FnOnce() -> T) -> T {
    let before = (STOP.replace(stop.clone()), ASKER.replace(asker));
    let result = f();
    STOP.set(before.0);
    ASKER.set(before.1);
    result
}

/// A request of this thread's begins.
pub(super) fn begin() {
    enter(Phase::Name);
    HAS_CONNECTED.set(false);
}

/// This thread's download waits for something else.
pub(super) fn enter(phase: Phase) {
    PHASE.set(phase);
}

/// What this thread's download waits for.
pub(super) fn phase() -> Phase {
    PHASE.get()
}

/// Whether a connection was made since the request began; else it goes over one that was kept.
pub(super) fn has_connected() -> bool {
    HAS_CONNECTED.get()
}

/// A download was told to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(super) struct Interrupted;

/// The other side has broken the connection off. The HTTP client would take it for the end of a body
/// of unknown length.
#[derive(Debug, thiserror::Error)]
#[error("the connection was reset")]
pub(super) struct BrokenOff;

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
/// more and more of them, nor keep others from theirs.
struct Place(u64);

/// How many places each asker has.
static TAKEN: Mutex<BTreeMap<u64, usize>> = Mutex::new(BTreeMap::new());

impl Place {
    fn take(wait: Wait) -> Result<Self, Error> {
        let asker = ASKER.get();
        loop {
            if Self::try_take(&mut TAKEN.lock(), asker) {
                return Ok(Self(asker));
            }
            wait.check()?;
            thread::sleep(LOOK);
        }
    }

    fn try_take(taken: &mut BTreeMap<u64, usize>, asker: u64) -> bool {
        let all: usize = taken.values().sum();
        let own = taken.get(&asker).copied().unwrap_or_default();
        let has_room = all < APART && own < APART_OF_ONE;
        if has_room {
            taken.insert(asker, own + 1);
        }
        has_room
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock();
        match taken.get_mut(&self.0) {
            Some(own) if *own > 1 => *own -= 1,
            _ => {
                taken.remove(&self.0);
            }
        }
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
        enter(Phase::Name);
        let resolved = apart(Wait::new(timeout), move || resolver.resolve(&uri, &config, none))?;
        enter(Phase::Connection);
        match resolved {
            Err(Error::Io(_look_up)) => Err(Error::HostNotFound),
            resolved => resolved,
        }
    }
}

/// Makes connections, unless there is one by a proxy.
#[derive(Debug)]
pub(super) struct Connect;

impl<In: Transport> Connector<In> for Connect {
    type Out = Either<In, Tcp>;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, Error> {
        HAS_CONNECTED.set(true);
        if let Some(transport) = chained {
            return Ok(Some(Either::A(transport)));
        }
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
        Ok(Some(Either::B(Tcp { stream, buffers: LazyBuffers::new(input, output) })))
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
pub(super) struct Tcp {
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
        let wait = Wait::new(timeout.for_read());
        loop {
            wait.check()?;
            match self.stream.read(self.buffers.input_append_buf()) {
                Ok(count) => {
                    self.buffers.input_appended(count);
                    return Ok(count > 0);
                }
                Err(error) if is_pause(&error) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Err(Error::Other(Box::new(BrokenOff)));
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_the_places_of_others() {
        let mut taken = BTreeMap::new();
        let mut take =
            |asker, times: usize| (0..times).filter(|_| Place::try_take(&mut taken, asker)).count();
        assert_eq!(take(1, 1000), APART_OF_ONE);
        assert_eq!(take(2, 1), 1);
        assert_eq!((3..9).map(|asker| take(asker, 1000)).sum::<usize>(), APART - APART_OF_ONE - 1);
    }
}
