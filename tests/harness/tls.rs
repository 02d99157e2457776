//! A picture by HTTPS, over each connection; the engine's own tests use this file too.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread,
};

use rcgen::{Certificate, KeyPair};
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    crypto::ring,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};

/// Serves bytes under any path of 127.0.0.1, until the test's process ends.
pub(crate) fn serve(certificate: &Certificate, key: &KeyPair, bytes: Vec<u8>) -> SocketAddr {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let session = ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = StreamOwned::new(session, stream.unwrap());
            let length = bytes.len();
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
            // Whoever does not trust us is gone.
            let _ = stream
                .read(&mut [0; 4096])
                .and_then(|_| stream.write_all(head.as_bytes()))
                .and_then(|()| stream.write_all(&bytes));
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
    });
    address
}
