//! Secure connections: whom they trust, and what is wrong with those that do not come about.
//!
//! Trusted are the system's authorities, or where it has none those that came with the program, and
//! besides them the authorities that the operator names.

use std::{
    io::{self, Read, Write},
    str::FromStr,
    sync::{Arc, OnceLock},
};

use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, OtherError,
    PeerIncompatible, RootCertStore, SignatureScheme, StreamOwned,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use ureq::{
    Error,
    unversioned::transport::{
        Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport,
        TransportAdapter, time,
    },
};

use super::{Phase, interrupt};

/// Certificates of authorities that are trusted besides the system's, from a file in PEM.
#[derive(Debug, Clone, Default)]
pub struct Authorities(Vec<CertificateDer<'static>>);

impl FromStr for Authorities {
    type Err = String;

    /// Reads the file of a path; no path, no authorities.
    fn from_str(path: &str) -> Result<Self, String> {
        if path.is_empty() {
            return Ok(Self::default());
        }
        let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
        let certificates: Vec<_> =
            read.map_err(|error| format!("cannot read '{path}': {error}"))?;
        let added = RootCertStore::empty().add_parsable_certificates(certificates.iter().cloned());
        match added {
            (1.., 0) => Ok(Self(certificates)),
            _ => Err(format!("'{path}' is no file of certificates")),
        }
    }
}

/// Why there is no secure connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TlsFault {
    /// The certificate's time is over.
    #[error("the server's certificate has expired")]
    Expired,
    /// The certificate's time has not come.
    #[error("the server's certificate is not valid yet")]
    NotYetValid,
    /// Nobody who is trusted has signed the certificate.
    #[error("the server's certificate is from an unknown authority")]
    UnknownAuthority,
    /// The certificate has signed itself.
    #[error("the server's certificate is self-signed")]
    SelfSigned,
    /// The certificate is another host's.
    #[error("the server's certificate is for another host name")]
    WrongName,
    /// Anything else about the certificate.
    #[error("the server's certificate is not valid")]
    BadCertificate,
    /// The server knows older versions of TLS only.
    #[error("the server offers neither TLS 1.2 nor TLS 1.3")]
    Version,
    /// The server speaks something else, such as HTTP.
    #[error("the server does not speak TLS")]
    NotTls,
    /// Anything else.
    #[error("the TLS handshake failed")]
    Other,
}

impl TlsFault {
    pub(super) fn of(error: &rustls::Error) -> Self {
        use rustls::{AlertDescription, Error, InvalidMessage};
        match error {
            Error::InvalidCertificate(problem) => Self::of_certificate(problem),
            Error::AlertReceived(AlertDescription::ProtocolVersion)
            | Error::PeerIncompatible(
                PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig,
            ) => Self::Version,
            Error::InvalidMessage(
                InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
            ) => Self::NotTls,
            _ => Self::Other,
        }
    }

    fn of_certificate(problem: &CertificateError) -> Self {
        use CertificateError as E;
        match problem {
            E::Expired | E::ExpiredContext { .. } => Self::Expired,
            E::NotValidYet | E::NotValidYetContext { .. } => Self::NotYetValid,
            E::NotValidForName | E::NotValidForNameContext { .. } => Self::WrongName,
            E::UnknownIssuer => Self::UnknownAuthority,
            E::Other(other) if other.0.is::<SelfSigned>() => Self::SelfSigned,
            _ => Self::BadCertificate,
        }
    }
}

/// Wraps the connections of `https` in TLS.
#[derive(Debug)]
pub(super) struct Secure {
    authorities: Authorities,
    /// Made for the first connection: the system's authorities are many.
    config: OnceLock<Arc<ClientConfig>>,
}

impl Secure {
    pub(super) fn new(authorities: Authorities) -> Self {
        Self { authorities, config: OnceLock::new() }
    }

    fn config(&self) -> Result<Arc<ClientConfig>, rustls::Error> {
        if let Some(config) = self.config.get() {
            return Ok(Arc::clone(config));
        }
        let provider = Arc::new(ring::default_provider());
        let verifier = Verifier::new(&provider, &self.authorities)?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        Ok(Arc::clone(self.config.get_or_init(|| Arc::new(config))))
    }
}

impl<In: Transport> Connector<In> for Secure {
    type Out = Connection<In>;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<Connection<In>>, Error> {
        let Some(transport) = chained else { return Ok(None) };
        if !details.needs_tls() {
            return Ok(Some(Connection::Plain(transport)));
        }
        let host = details.uri.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.');
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let config = self.config().map_err(io::Error::other)?;
        let mut session = ClientConnection::new(config, name).map_err(io::Error::other)?;
        let mut socket = TransportAdapter::new(transport, Arc::clone(&details.current_time));
        socket.set_timeout(time_left(details));
        session.complete_io(&mut socket)?;
        let (input, output) =
            (details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(Connection::Tls(Box::new(Tls {
            stream: StreamOwned::new(session, socket),
            buffers: LazyBuffers::new(input, output),
        }))))
    }
}

/// What is left of the time to connect.
fn time_left(details: &ConnectionDetails<'_>) -> NextTimeout {
    let mut timeout = details.timeout;
    if let (time::Duration::Exact(all), time::Instant::Exact(start)) = (timeout.after, details.now)
    {
        timeout.after = all.saturating_sub(start.elapsed()).into();
    }
    timeout
}

/// A connection as the HTTP client has it.
#[derive(Debug)]
pub(super) enum Connection<T: Transport> {
    Plain(T),
    Tls(Box<Tls<T>>),
}

impl<T: Transport> Connection<T> {
    fn transport(&mut self) -> &mut dyn Transport {
        match self {
            Self::Plain(transport) => transport,
            Self::Tls(tls) => &mut **tls,
        }
    }
}

impl<T: Transport> Transport for Connection<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.transport().buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        interrupt::enter(Phase::Answer);
        self.transport().transmit_output(amount, timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.transport().await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.transport().is_open()
    }

    fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }
}

/// What goes through TLS.
pub(super) struct Tls<T: Transport> {
    stream: StreamOwned<ClientConnection, TransportAdapter<T>>,
    buffers: LazyBuffers,
}

impl<T: Transport> std::fmt::Debug for Tls<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tls").field(&self.stream.sock.get_ref()).finish()
    }
}

impl<T: Transport> Transport for Tls<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.stream.sock.set_timeout(timeout);
        self.stream.write_all(&self.buffers.output()[..amount])?;
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.stream.sock.set_timeout(timeout);
        let count = self.stream.read(self.buffers.input_append_buf())?;
        self.buffers.input_appended(count);
        Ok(count > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.sock.get_mut().is_open()
    }
}

/// The usual check of certificates, which tells more of what it refuses.
#[derive(Debug)]
struct Verifier {
    usual: Arc<WebPkiServerVerifier>,
    authorities: Authorities,
}

/// A certificate that has signed itself.
#[derive(Debug, thiserror::Error)]
#[error("self-signed")]
struct SelfSigned;

impl Verifier {
    fn new(
        provider: &Arc<CryptoProvider>,
        authorities: &Authorities,
    ) -> Result<Self, rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
        roots.add_parsable_certificates(authorities.0.iter().cloned());
        let builder =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider));
        let usual = builder.build().map_err(|error| rustls::Error::General(error.to_string()))?;
        Ok(Self { usual, authorities: authorities.clone() })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use rustls::Error::InvalidCertificate;
        let verified = self.usual.verify_server_cert(certificate, others, name, ocsp, now);
        let Err(InvalidCertificate(problem)) = &verified else { return verified };
        let is_authority = matches!(problem, CertificateError::Other(other)
            if other.0.downcast_ref() == Some(&webpki::Error::CaUsedAsEndEntity));
        if !is_authority && *problem != CertificateError::UnknownIssuer {
            return verified;
        }
        let parsed = webpki::EndEntityCert::try_from(certificate)
            .map_err(|_error| InvalidCertificate(CertificateError::BadEncoding))?;
        // A certificate that OpenSSL signs by itself is an authority's, which the usual check takes
        // from no server; its time has been found right by then.
        if is_authority && self.authorities.0.contains(certificate) {
            return match parsed.verify_is_valid_for_subject_name(name) {
                Ok(()) => Ok(ServerCertVerified::assertion()),
                Err(_other_name) => Err(InvalidCertificate(CertificateError::NotValidForName)),
            };
        }
        if parsed.issuer() == parsed.subject() {
            let problem = CertificateError::Other(OtherError(Arc::new(SelfSigned)));
            return Err(InvalidCertificate(problem));
        }
        verified
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}
