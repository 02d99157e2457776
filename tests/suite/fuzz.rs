//! Random and mutated commands and pictures: the server lives, and its memory stays bounded.
//!
//! `make fuzz` sends a million commands and 20,000 pictures; `FLORENCE_FUZZ` multiplies the few of
//! the ordinary run. The seed is fixed, so that a failure can be seen again.

use std::{
    collections::HashMap,
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
};

use florence_tests::{Server, Settings, picture};

/// xorshift64*: good enough, and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    fn byte(&mut self) -> u8 {
        self.below(256).to_le_bytes()[0]
    }

    fn pick<'a>(&mut self, from: &[&'a [u8]]) -> &'a [u8] {
        from[self.below(from.len())]
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most)).map(|_| self.byte()).collect()
    }

    /// Changes, drops, doubles or inserts a few bytes.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len().max(1));
            match self.below(5) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                1 if !bytes.is_empty() => bytes[at] = self.byte(),
                2 => bytes.truncate(at),
                3 => bytes.insert(at, self.byte()),
                _ => {
                    let end = (at + self.below(64)).min(bytes.len());
                    let part = bytes[at.min(end)..end].to_vec();
                    bytes.splice(at..at, part);
                }
            }
        }
    }
}

type Chunk = ([u8; 4], Vec<u8>);

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";

/// The chunks of a PNG, as far as they are whole.
fn chunks(png: &[u8]) -> Vec<Chunk> {
    let (mut rest, mut chunks) = (&png[PNG.len()..], Vec::new());
    while let Some((length, tail)) = rest.split_first_chunk()
        && let Some((kind, tail)) = tail.split_first_chunk()
        && let Some((data, tail)) = tail.split_at_checked(u32::from_be_bytes(*length) as usize)
    {
        chunks.push((*kind, data.to_vec()));
        rest = tail.get(4..).unwrap_or_default();
    }
    chunks
}

/// A PNG of chunks, with the lengths and checksums that they have: wrong ones would hide from the
/// decoder what else is wrong.
fn png(chunks: &[Chunk]) -> Vec<u8> {
    let mut png = PNG.to_vec();
    for (kind, data) in chunks {
        let body = [kind, data.as_slice()].concat();
        png.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        png.extend(&body);
        png.extend(crc32fast::hash(&body).to_be_bytes());
    }
    png
}

/// A row of two colours that a palette has, one of them transparent.
fn palette_png() -> Vec<u8> {
    let rows = b"\x78\x01\x01\x03\0\xfc\xff\0\0\x01\0\x04\0\x02";
    png(&[
        (*b"IHDR", b"\0\0\0\x02\0\0\0\x01\x08\x03\0\0\0".to_vec()),
        (*b"PLTE", b"\x01\x02\x03\x04\x05\x06".to_vec()),
        (*b"tRNS", b"\x80".to_vec()),
        (*b"IDAT", rows.to_vec()),
        (*b"IEND", Vec::new()),
    ])
}

/// Reads one reply in RESP2. An error is as good as any, and may hold bytes that are no text.
fn skip_reply(from: &mut BufReader<TcpStream>) -> io::Result<()> {
    let mut line = Vec::new();
    from.read_until(b'\n', &mut line)?;
    let text = String::from_utf8_lossy(&line);
    let count = || text[1..].trim().parse::<i64>().map_err(io::Error::other);
    match line.first() {
        Some(b'+' | b'-' | b':') => Ok(()),
        Some(b'$') => {
            let bytes = count()? + 2;
            let mut rest = vec![0; usize::try_from(bytes).unwrap_or_default()];
            // A null has no bytes, not even an end of line.
            if bytes > 1 { from.read_exact(&mut rest) } else { Ok(()) }
        }
        Some(b'*') => (0..count()?).try_for_each(|_| skip_reply(from)),
        _ => Err(io::Error::other(format!("no reply: {text:?}"))),
    }
}

fn rounds(few: usize) -> usize {
    let times = std::env::var("FLORENCE_FUZZ").ok();
    few * times.map_or(1, |times| times.parse::<usize>().expect("a factor"))
}

#[test]
fn random_commands_do_not_end_the_server() {
    const BATCH: usize = 500;
    let words: Vec<&[u8]> = "DATA KEY PROMPTS PRIORITY DELAY EXPIRES TIMEOUT RETRIES TTL BEAMS \
        MAXTOKENS MODEL EXIF NOCACHE THUMBNAIL TOKENS NBEST THEN EACH CROP MARGIN TEMPERATURE TOPK TOPP SEED NGRAM LENGTHPENALTY RESULT STATE COUNT LATENCY JOBS queued done ended nonsense * a b c {a}b 0 1 2 9 -1 \
        16 1e3 9223372036854775807 -9223372036854775808 0.001 nan <CAPTION> <OD> <OCR> \
        <REGION_TO_OCR><loc_1><loc_2><loc_3><loc_4> <OPEN_VOCABULARY_DETECTION>cat \
        <CAPTION_TO_PHRASE_GROUNDING> data: data:image/png;base64,iVBORw0KGgo= data:,x \
        http://127.0.0.1:1/x http:// https://[::1 file:///etc/passwd /etc/passwd gs://a/b s3://a/b \
        s3:// text hash \u{100} LOAD UNLOAD DEFAULT PRECISION int16 ADAPTER tiny other /tmp"
        .split_ascii_whitespace()
        .map(str::as_bytes)
        .collect();
    let commands: Vec<&[u8]> = "FLORENCE.SUBMIT FLORENCE.SUBMIT FLORENCE.SUBMIT FLORENCE.GET \
        FLORENCE.CANCEL FLORENCE.RETRY FLORENCE.JOBS FLORENCE.STATS FLORENCE.HOSTS \
        FLORENCE.MODEL FLORENCE.MODEL FLORENCE.MODEL.CHANGE FLORENCE.HELP DEL RENAME COPY HSET HDEL EXPIRE PERSIST OBJECT"
        .split_ascii_whitespace()
        .map(str::as_bytes)
        .collect();
    let prompts: Vec<&[u8]> = vec![b"<CAPTION>", b"<OD>", b"<OCR>"];
    let module_args = ["max-queue", "2000"].map(str::to_owned).into();
    let mut server = Server::with(Settings {
        module_args,
        ..Settings::lines(&[
            "florence.default-retries 0",
            "florence.default-ttl 2",
            "florence.model-roots /tmp",
        ])
    });
    server.wait_for_model();
    server.call::<()>(&["SET", "text", "x"]);
    server.call::<()>(&["HSET", "hash", "florence", "1", "state", "running"]);
    let mut random = Random(0x5eed);
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    let mut replies = BufReader::new(stream.try_clone().unwrap());
    let before = server.usage()[0];
    for round in 0..rounds(40) {
        let mut pipe = redis::pipe();
        for i in 0..BATCH {
            // Waiting blocks the connection for a while.
            let name = if i == 0 { b"FLORENCE.WAIT" } else { random.pick(&commands) };
            let mut command = redis::cmd(std::str::from_utf8(name).unwrap());
            if name == b"FLORENCE.SUBMIT" && random.below(2) == 0 {
                let key = random.below(300).to_string();
                command.arg(key).arg("http://127.0.0.1:1/x").arg(random.pick(&prompts));
            }
            let count = random.below(if command.args_iter().count() > 1 { 3 } else { 9 });
            for _ in 0..count {
                let mut word = random.pick(&words).to_vec();
                match random.below(12) {
                    0 => random.mutate(&mut word),
                    1 => word = random.bytes(40),
                    _ => {}
                }
                command.arg(word);
            }
            if name == b"FLORENCE.WAIT" {
                command.arg("0.001");
            }
            pipe.add_command(command);
        }
        stream.write_all(&pipe.get_packed_pipeline()).unwrap();
        for _ in 0..BATCH {
            skip_reply(&mut replies).unwrap_or_else(|error| panic!("round {round}: {error}"));
        }
        // Every command of the server's own has changed the keys: begin anew now and then.
        if round % 50 == 49 {
            server.call::<()>(&["FLUSHALL"]);
            server.call::<()>(&["HSET", "hash", "florence", "1", "state", "running"]);
        }
    }
    assert!(server.is_alive());
    assert_eq!(server.stat("panics"), 0, "{}", server.log());
    let submitted = server.stat("jobs_submitted");
    assert!(submitted > 0);
    server.call::<()>(&["FLUSHALL"]);
    assert_eq!(server.stat("jobs_waiting") + server.stat("waiters"), 0);
    let grown = server.usage()[0].saturating_sub(before) >> 10;
    println!("fuzz: {} commands, {submitted} jobs, memory grew by {grown} MiB", rounds(40) * BATCH);
    assert!(grown < 600, "{grown} MiB");
}

/// A job is a hash, and so is what a file, a master or `RESTORE` brings of one: any field may say
/// anything.
#[test]
fn mutated_jobs_do_not_end_the_server() {
    let mut server = Server::with(Settings::lines(&[
        "florence.default-retries 0",
        "florence.retry-delay-ms 1",
        "florence.retain-bytes 1000000",
    ]));
    server.wait_for_model();
    let mut connection = server.connect();
    let bytes = std::fs::read(picture("sign.png")).unwrap();
    let mut submit = redis::cmd("FLORENCE.SUBMIT");
    submit.arg("job").arg("DATA").arg(bytes).arg("<CAPTION>").arg("MAXTOKENS").arg(2);
    submit.arg("EXPIRES").arg(60_000).exec(&mut connection).unwrap();
    server.call::<HashMap<String, Option<String>>>(&["FLORENCE.WAIT", "job", "60"]);
    let mut job: Vec<(Vec<u8>, Vec<u8>)> =
        redis::cmd("HGETALL").arg("job").query(&mut connection).unwrap();
    for (field, value) in [
        ("crashes", "0"),
        ("delay", "1"),
        ("retry_at", "1"),
        ("wants", "tiny"),
        ("stream", "s"),
        ("nbest_count", "2"),
    ] {
        job.push((field.into(), value.into()));
    }
    let values: Vec<&[u8]> =
        "queued fetching running retrying done failed cancelled expired 0 1 2 \
        -1 16 1e3 9223372036854775807 -9223372036854775808 99999999999999999999 [] [\"<OD>\"] [1] \
        {} DATA KEY /etc/passwd http://127.0.0.1:1/x <OD> nonsense"
            .split_ascii_whitespace()
            .map(str::as_bytes)
            .collect();
    let (mut random, before) = (Random(0xbead), server.usage()[0]);
    let count = rounds(400);
    for first in (0..count).step_by(100) {
        let keys: Vec<String> = (first..first + 100).map(|i| format!("m{i}")).collect();
        for key in &keys {
            let mut fields = job.clone();
            for _ in 0..=random.below(3) {
                let at = random.below(fields.len());
                match random.below(4) {
                    0 => drop(fields.swap_remove(at)),
                    1 => random.mutate(&mut fields[at].1),
                    2 => fields[at].1 = random.bytes(40),
                    _ => fields[at].1 = random.pick(&values).to_vec(),
                }
            }
            let _: usize = redis::cmd("HSET").arg(key).arg(fields).query(&mut connection).unwrap();
            // The same hash once more, as a payload, unless the budget has taken it already.
            let dump = redis::cmd("DUMP").arg(key).query(&mut connection).unwrap();
            let Some::<Vec<u8>>(payload) = dump else { continue };
            let mut restore = redis::cmd("RESTORE");
            restore.arg(format!("{key}-restored")).arg(0).arg(payload);
            restore.arg("REPLACE").exec(&mut connection).unwrap();
        }
        for key in &keys {
            for command in ["FLORENCE.GET", "FLORENCE.RETRY", "FLORENCE.CANCEL", "FLORENCE.GET"] {
                let _ = redis::cmd(command).arg(key).query::<redis::Value>(&mut connection);
            }
            let mut wait = redis::cmd("FLORENCE.WAIT");
            let _ = wait.arg(key).arg("0.001").query::<redis::Value>(&mut connection);
        }
        server.call::<redis::Value>(&["FLORENCE.JOBS"]);
    }
    assert!(server.is_alive());
    assert_eq!(server.stat("panics"), 0, "{}", server.log());
    server.call::<()>(&["FLUSHALL"]);
    assert_eq!(server.stat("jobs_waiting") + server.stat("waiters"), 0);
    let grown = server.usage()[0].saturating_sub(before) >> 10;
    println!("fuzz: {count} jobs with mutated fields, memory grew by {grown} MiB");
    assert!(grown < 600, "{grown} MiB");
}

#[test]
fn a_picture_whose_parts_hold_one_another_does_not_end_the_server() {
    let mut server = Server::ready(&[]);
    let frames = [&b"ANMF\xff\xff\xff\xff"[..], &[0; 16]].concat().repeat(100_000);
    let length = u32::try_from(4 + frames.len()).unwrap().to_le_bytes();
    let picture = [b"RIFF", &length[..], b"WEBP", &frames].concat();
    let _: String = redis::cmd("FLORENCE.SUBMIT")
        .arg("nested")
        .arg("DATA")
        .arg(picture)
        .arg("<OCR>")
        .query(&mut server.connect())
        .unwrap();
    let job: HashMap<String, Option<String>> = server.call(&["FLORENCE.WAIT", "nested", "30"]);
    assert_eq!(job["state"].as_deref(), Some("failed"), "{job:?}");
    assert!(server.is_alive());
}

#[test]
fn mutated_pictures_do_not_end_the_server() {
    let mut server = Server::with(Settings::lines(&[
        "florence.max-image-pixels 4000000",
        "florence.image-formats \"jpeg png webp gif bmp tiff\"",
        "florence.default-ttl 30",
    ]));
    server.wait_for_model();
    let originals: Vec<Vec<u8>> = std::fs::read_dir(picture("shapes.png").parent().unwrap())
        .unwrap()
        .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
        .chain([
            b"GIF89a\x02\0\x02\0\x80\0\0\xff\xff\xff\0\0\0,\0\0\0\0\x02\0\x02\0\0\x02\x02D\x01\0;".to_vec(),
            b"BM:\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\x01\0\0\0\x01\0\0\0\x01\0\x18\0\0\0\0\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xff\0\0\0".to_vec(),
            b"RIFF\x24\0\0\0WEBPVP8L\x17\0\0\0\x2f\0\0\0\0\x07\x10\xfd\x8f\xfe\x07\x22\xa2\xff\x01\0".to_vec(),
            palette_png(),
            b"II*\0\x08\0\0\0\x02\0\0\x01\x03\0\x01\0\0\0\x01\0\0\0\x01\x01\x03\0\x01\0\0\0\x01\0\0\0\0\0\0\0".to_vec(),
        ])
        .collect();
    let (mut random, mut connection) = (Random(0xfeed), server.connect());
    let before = server.usage()[0];
    let count = rounds(200);
    let mut ends = HashMap::<String, usize>::new();
    for first in (0..count).step_by(50) {
        let keys: Vec<String> = (first..first + 50).map(|i| format!("p{i}")).collect();
        for key in &keys {
            let mut bytes = originals[random.below(originals.len())].clone();
            if bytes.starts_with(PNG) && random.below(2) == 0 {
                let mut chunks = chunks(&bytes);
                let at = random.below(chunks.len());
                random.mutate(&mut chunks[at].1);
                bytes = png(&chunks);
            } else {
                random.mutate(&mut bytes);
            }
            if random.below(3) == 0 {
                // Most of what matters stands in the first bytes.
                let at = random.below(bytes.len().clamp(1, 64));
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = random.byte();
                }
            }
            bytes.push(0);
            let _: String = redis::cmd("FLORENCE.SUBMIT")
                .arg(key)
                .arg("DATA")
                .arg(bytes)
                .arg("<CAPTION>")
                .arg("MAXTOKENS")
                .arg(2)
                .arg("BEAMS")
                .arg(1)
                .query(&mut connection)
                .unwrap();
        }
        for key in &keys {
            let job: HashMap<String, Option<String>> = server.call(&["FLORENCE.WAIT", key, "60"]);
            *ends.entry(job["state"].clone().unwrap()).or_default() += 1;
        }
    }
    assert!(server.is_alive());
    assert_eq!(server.stat("panics"), 0, "{}", server.log());
    // A decoder's panic is no fault of the server's, and yet one to know of.
    assert!(!server.log().contains("panicked at"), "{}", server.log());
    let grown = server.usage()[0].saturating_sub(before) >> 10;
    println!("fuzz: {count} pictures, {ends:?}, memory grew by {grown} MiB");
    assert!(grown < 800, "{grown} MiB");
}
