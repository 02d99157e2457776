//! Why there are no bytes, in words that carry no query string, credential or address.

use std::{error::Error, io, io::ErrorKind};

use super::{
    guard::Forbidden,
    interrupt::{self, BrokenOff, Interrupted},
    tls::TlsFault,
};

/// Why there are no bytes.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Neither `http` nor `https`, no host, or too long.
    #[error("not an http or https URL")]
    BadUrl,
    /// A bucket's name or object is malformed.
    #[error("not a URL of a bucket's object")]
    BadObject,
    /// What lists a bucket's objects is not as it must be.
    #[error("the list of the bucket's objects cannot be read")]
    BadListing,
    /// There are no credentials, or the token server refused them.
    #[error("the server has no valid credentials for the bucket")]
    Credentials,
    /// No access token for the bucket, for now.
    #[error("the server that gives access to the bucket does not answer as it should")]
    NoToken(#[source] Box<FetchError>),
    /// A host that may not be asked, by its name or its address.
    #[error("{0}")]
    Denied(Rule),
    /// A redirect to what is not allowed.
    #[error(transparent)]
    DeniedRedirect(Box<FetchError>),
    /// A redirect to what is no URL of the web.
    #[error("the server redirects to what is not an http or https URL")]
    BadRedirect,
    /// A redirect from `https` to `http`.
    #[error("the server redirects from https to http")]
    Downgrade,
    /// Too many redirects.
    #[error("the server redirects more than {0} times")]
    Redirects(u32),
    /// The name has no address, as far as can be found out.
    #[error("the host's name cannot be resolved")]
    NoHost,
    /// Nobody listens there.
    #[error("the server refused the connection")]
    Refused,
    /// There is no way to the server's network.
    #[error("the server cannot be reached")]
    Unreachable,
    /// No secure connection.
    #[error("{0}")]
    Tls(TlsFault),
    /// Something did not happen in time.
    #[error("{0} in time")]
    Timeout(Phase),
    /// Slower than allowed.
    #[error("the server sent too slowly")]
    TooSlow,
    /// The server closed the connection and had not answered.
    #[error("the server closed the connection without an answer")]
    Closed,
    /// What came first is no HTTP, or its headers are not as they must be.
    #[error("the server's answer cannot be read as HTTP")]
    NotHttp,
    /// The server answered with an error.
    #[error("the server answered {0}")]
    Status(u16),
    /// The body is larger than allowed.
    #[error("the picture is larger than the limit of {0} bytes")]
    TooLarge(u64),
    /// The body ended too soon.
    #[error("the download broke off before its end")]
    BrokenOff,
    /// The body's chunks or its encoding are not as they must be.
    #[error("the download is damaged")]
    Damaged,
    /// The caller asked for the download to stop.
    #[error("the download was interrupted")]
    Interrupted,
    /// Anything else.
    #[error("the download failed")]
    Other(#[source] Box<ureq::Error>),
}

/// The rule by which a host may not be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rule {
    /// Only some hosts are allowed.
    #[error("the host is not among those that are allowed")]
    AllowHosts,
    /// The host is denied by name.
    #[error("the host is among those that are denied")]
    DenyHosts,
    /// The host's address is not public, nor in a network that is allowed.
    #[error("the host's address is neither public nor in a network that is allowed")]
    AllowNetworks,
    /// The host's address is in a network that is denied.
    #[error("the host's address is in a network that is denied")]
    DenyNetworks,
}

/// What a download waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Phase {
    /// The addresses of a name.
    #[error("the host's name was not resolved")]
    Name,
    /// A connection, a secure one with `https`.
    #[error("there was no connection to the server")]
    Connection,
    /// The head of the answer.
    #[error("the server did not answer")]
    Answer,
    /// The rest of it.
    #[error("the server did not send everything")]
    Body,
}

impl FetchError {
    /// Whether another attempt may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Status(status) => matches!(status, 408 | 429 | 500..),
            Self::Tls(fault) => *fault == TlsFault::Other,
            Self::NoToken(_)
            | Self::NoHost
            | Self::Refused
            | Self::Unreachable
            | Self::Timeout(_)
            | Self::TooSlow
            | Self::Closed
            | Self::NotHttp
            | Self::BrokenOff
            | Self::Damaged
            | Self::Interrupted
            | Self::Other(_) => true,
            Self::BadUrl
            | Self::BadObject
            | Self::BadListing
            | Self::Credentials
            | Self::Denied(_)
            | Self::DeniedRedirect(_)
            | Self::BadRedirect
            | Self::Downgrade
            | Self::Redirects(_)
            | Self::TooLarge(_) => false,
        }
    }

    /// What an error of the client means, where this thread's download is.
    pub(super) fn of(error: ureq::Error) -> Self {
        match error {
            ureq::Error::StatusCode(status) => Self::Status(status),
            ureq::Error::Io(error) => Self::of_io(error),
            ureq::Error::BodyExceedsLimit(limit) => Self::TooLarge(limit),
            ureq::Error::Timeout(_) => Self::Timeout(interrupt::phase()),
            ureq::Error::HostNotFound => Self::NoHost,
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => Self::BadUrl,
            ureq::Error::Protocol(_)
            | ureq::Error::LargeResponseHeader(..)
            | ureq::Error::BodyStalled => match interrupt::phase() {
                Phase::Body => Self::Damaged,
                _ => Self::NotHttp,
            },
            ureq::Error::Other(other) => {
                if let Some(Forbidden(rule)) = other.downcast_ref() {
                    Self::Denied(*rule)
                } else if other.is::<Interrupted>() {
                    Self::Interrupted
                } else if other.is::<BrokenOff>() {
                    Self::of_io(ErrorKind::ConnectionReset.into())
                } else {
                    Self::Other(Box::new(ureq::Error::Other(other)))
                }
            }
            other => Self::Other(Box::new(other)),
        }
    }

    fn of_io(error: io::Error) -> Self {
        if let Some(fault) = inner::<rustls::Error>(&error) {
            return Self::Tls(TlsFault::of(fault));
        }
        // What reading a body meets comes wrapped.
        if inner::<ureq::Error>(&error).is_some() {
            return match error.downcast() {
                Ok(inner) => Self::of(inner),
                Err(error) => Self::Other(Box::new(error.into())),
            };
        }
        let phase = interrupt::phase();
        match error.kind() {
            ErrorKind::ConnectionRefused => Self::Refused,
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown => {
                Self::Unreachable
            }
            ErrorKind::TimedOut => Self::Timeout(phase),
            _ if is_end(&error) && phase == Phase::Body => Self::BrokenOff,
            _ if is_end(&error) => Self::Closed,
            // Of an encoding that is undone.
            ErrorKind::InvalidData | ErrorKind::InvalidInput if phase == Phase::Body => {
                Self::Damaged
            }
            _ => Self::Other(Box::new(error.into())),
        }
    }
}

/// Whether the other side has closed the connection.
pub(super) fn is_closed(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::Io(error) => is_end(error),
        ureq::Error::Other(other) => other.is::<BrokenOff>(),
        _ => false,
    }
}

fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::WriteZero
    )
}

fn inner<T: Error + 'static>(error: &io::Error) -> Option<&T> {
    error.get_ref()?.downcast_ref()
}
