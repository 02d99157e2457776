//! Secure connections to servers whose certificates are right and wrong.

#[path = "../../../../tests/harness/tls.rs"]
mod server;

use std::{
    io::{Read, Write},
    net::TcpListener,
    path::Path,
    thread,
};

use super::{
    super::{Authorities, Buckets, FetchError, FetchLimits, Fetcher, TlsFault},
    on_loopback,
};
use crate::Stop;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};

/// An authority: it signs, and its certificate is in a file.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let pem = params.self_signed(&key).unwrap().pem();
    Authority { issuer: Issuer::new(params, key), pem }
}

/// What a server has of its own: certificate and key.
type Identity = (rcgen::Certificate, KeyPair);

fn signed(authority: &Authority, change: impl FnOnce(&mut CertificateParams)) -> Identity {
    let (params, key) = (params(change), KeyPair::generate().unwrap());
    (params.signed_by(&key, &authority.issuer).unwrap(), key)
}

fn self_signed(change: impl FnOnce(&mut CertificateParams)) -> Identity {
    let (params, key) = (params(change), KeyPair::generate().unwrap());
    (params.self_signed(&key).unwrap(), key)
}

fn params(change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "server");
    change(&mut params);
    params
}

/// A server that answers one picture over each connection.
fn serve((certificate, key): Identity) -> u16 {
    server::serve(&certificate, &key, b"picture".to_vec()).port()
}

/// A server that answers a handshake with these bytes.
fn answers(bytes: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(bytes);
        }
    });
    port
}

fn fetch(port: u16, trusted: &Authorities) -> Result<Vec<u8>, FetchError> {
    let fetcher = Fetcher::new(on_loopback(), Buckets::default(), trusted);
    let url = format!("HTTPS://127.0.0.1:{port}/x.png");
    fetcher.fetch(&url, &FetchLimits::default(), &Stop::default())
}

fn trusted(directory: &Path, pems: &[&str]) -> Authorities {
    let file = directory.join("authorities.pem");
    std::fs::write(&file, pems.concat()).unwrap();
    file.to_str().unwrap().parse().unwrap()
}

#[test]
fn only_those_are_trusted_whose_authority_is() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, others) = (authority("ours"), authority("others"));
    let trusted = trusted(directory.path(), &[&others.pem, &ours.pem]);
    let port = serve(signed(&ours, |_| {}));
    assert_eq!(fetch(port, &trusted).unwrap(), b"picture");
    let expired = |params: &mut CertificateParams| params.not_after = date_time_ymd(2001, 1, 1);
    let early = |params: &mut CertificateParams| params.not_before = date_time_ymd(3001, 1, 1);
    let other_name = |params: &mut CertificateParams| {
        params.subject_alt_names =
            CertificateParams::new(["a.example".to_owned()]).unwrap().subject_alt_names;
    };
    for (identity, fault) in [
        (signed(&ours, expired), TlsFault::Expired),
        (signed(&ours, early), TlsFault::NotYetValid),
        (signed(&ours, other_name), TlsFault::WrongName),
        (signed(&authority("unknown"), |_| {}), TlsFault::UnknownAuthority),
        // Of a name that is trusted, but not of its key.
        (signed(&authority("ours"), |_| {}), TlsFault::BadCertificate),
        (self_signed(|_| {}), TlsFault::SelfSigned),
        (
            self_signed(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            TlsFault::SelfSigned,
        ),
    ] {
        let fetched = fetch(serve(identity), &trusted);
        let Err(FetchError::Tls(found)) = fetched else { panic!("{fault:?}: {fetched:?}") };
        assert_eq!(found, fault);
        assert!(!FetchError::Tls(found).is_transient());
    }
    let fetched = fetch(port, &Authorities::default());
    assert!(matches!(fetched, Err(FetchError::Tls(TlsFault::UnknownAuthority))), "{fetched:?}");
}

#[test]
fn a_self_signed_certificate_is_trusted_where_it_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let as_openssl = |params: &mut CertificateParams| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    };
    for identity in [self_signed(|_| {}), self_signed(as_openssl)] {
        let trusted = trusted(directory.path(), &[&identity.0.pem()]);
        assert_eq!(fetch(serve(identity), &trusted).unwrap(), b"picture");
    }
    let wrong = [
        self_signed(|params| {
            as_openssl(params);
            params.subject_alt_names = Vec::new();
        }),
        self_signed(|params| {
            as_openssl(params);
            params.not_after = date_time_ymd(2001, 1, 1);
        }),
    ];
    for (identity, fault) in wrong.into_iter().zip([TlsFault::WrongName, TlsFault::Expired]) {
        let trusted = trusted(directory.path(), &[&identity.0.pem()]);
        let fetched = fetch(serve(identity), &trusted);
        assert!(matches!(&fetched, Err(FetchError::Tls(found)) if *found == fault), "{fetched:?}");
    }
}

#[test]
fn a_file_of_authorities_holds_certificates() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file.pem");
    let path = file.to_str().unwrap();
    assert!(path.parse::<Authorities>().is_err());
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for text in ["", "no certificate", broken, &(authority("a").pem + broken)] {
        std::fs::write(&file, text).unwrap();
        assert!(path.parse::<Authorities>().is_err(), "{text}");
    }
    assert!("".parse::<Authorities>().is_ok());
}

#[test]
fn handshakes_that_fail_are_told_apart() {
    // A fatal alert: protocol version, handshake failure. A ServerHello of TLS 1.1.
    let old = b"\x15\x03\x01\x00\x02\x02\x46";
    let failure = b"\x15\x03\x03\x00\x02\x02\x28";
    let hello = b"\x16\x03\x02\x00\x2a\x02\x00\x00\x26\x03\x020123456789abcdef0123456789abcdef\x00\x00\x2f\x00";
    for (bytes, fault) in [
        (&old[..], TlsFault::Version),
        (hello, TlsFault::Version),
        (failure, TlsFault::Other),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", TlsFault::NotTls),
    ] {
        let fetched = fetch(answers(bytes), &Authorities::default());
        assert!(
            matches!(&fetched, Err(FetchError::Tls(found)) if *found == fault),
            "{fault:?}: {fetched:?}"
        );
    }
    let fetched = fetch(answers(b""), &Authorities::default());
    assert!(matches!(fetched, Err(FetchError::Closed)), "{fetched:?}");
}
