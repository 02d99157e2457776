//! A picture by HTTPS, from a server with an authority of its own.

use crate::tls;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd,
};

/// An authority that signs certificates of 127.0.0.1.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate's validity.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    Now,
    Over,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "Authority of the tests");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Its certificate.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// Serves bytes under any path; the server's URL.
    pub fn serve(&self, validity: Validity, bytes: Vec<u8>) -> String {
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "Server of the tests");
        if validity == Validity::Over {
            params.not_after = date_time_ymd(2001, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        format!("https://{}/", tls::serve(&certificate, &key, bytes))
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}
