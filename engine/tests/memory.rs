//! What is reserved for decoding pictures, held against what the decoders take from the allocator.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    io::Cursor,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use florence_engine::{
    Budget,
    image::{DecodeLimits, Orientation, decode, resize_bicubic},
};
use image::{ExtendedColorType as Color, ImageFormat as Format};
use parking_lot::Mutex;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn add(size: usize) {
    PEAK.fetch_max(NOW.fetch_add(size, Relaxed) + size, Relaxed);
}

// SAFETY: everything is the system allocator's; the numbers touch no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // What shrinks stays where it is; what grows may be there twice.
        if size > layout.size() {
            add(size);
            NOW.fetch_sub(layout.size(), Relaxed);
        } else {
            NOW.fetch_sub(layout.size() - size, Relaxed);
        }
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time: they count what all of the process takes.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs `f`; the most bytes that were taken meanwhile.
fn peak<T>(f: impl FnOnce() -> T) -> (T, u64) {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = f();
    (result, (PEAK.load(Relaxed) - before) as u64)
}

fn encoded((width, height): (u32, u32), color: Color, format: Format) -> Vec<u8> {
    let bytes = width as usize * height as usize * usize::from(color.bits_per_pixel()) / 8;
    let mut out = Cursor::new(Vec::new());
    let pixels = vec![77; bytes];
    image::write_buffer_with_format(&mut out, &pixels, width, height, color, format).unwrap();
    out.into_inner()
}

/// A JPEG file; its decoder is C, which takes nothing from the allocator that counts.
fn is_jpeg(file: &[u8]) -> bool {
    file.starts_with(b"\xff\xd8")
}

/// A picture of every kind that the decoders treat in a way of its own.
fn pictures() -> Vec<(String, Vec<u8>)> {
    let mut pictures: Vec<(String, Vec<u8>)> = Vec::new();
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/decoders");
    for entry in std::fs::read_dir(fixtures).unwrap() {
        let path = entry.unwrap().path();
        pictures.push((path.display().to_string(), std::fs::read(path).unwrap()));
    }
    assert!(pictures.len() >= 6);
    let size = (1024, 768);
    for (color, formats) in [
        (Color::L8, &[Format::Png, Format::Jpeg][..]),
        (Color::La8, &[Format::Png]),
        (
            Color::Rgb8,
            &[Format::Png, Format::Jpeg, Format::WebP, Format::Gif, Format::Bmp, Format::Tiff],
        ),
        (Color::Rgba8, &[Format::Png, Format::WebP, Format::Bmp, Format::Tiff]),
        (Color::L16, &[Format::Png, Format::Tiff]),
        (Color::Rgba16, &[Format::Png, Format::Tiff]),
        (Color::Rgb16, &[Format::Tiff]),
    ] {
        for format in formats {
            pictures.push((format!("{format:?} {color:?}"), encoded(size, color, *format)));
        }
    }
    let mut gif = encoded(size, Color::Rgb8, Format::Gif);
    gif[6..10].copy_from_slice(&[0, 5, 0, 4]);
    pictures.push(("GIF with a frame that does not fill it".to_owned(), gif));
    pictures
}

#[test]
fn what_is_reserved_is_what_decoding_takes() {
    let _alone = ALONE.lock();
    for (name, bytes) in pictures().into_iter().filter(|(_, bytes)| !is_jpeg(bytes)) {
        let budget = Budget::new(0);
        let limits = DecodeLimits { budget: Some(budget.clone()), ..DecodeLimits::default() };
        let (decoded, real) = peak(|| decode(&bytes, &limits, Orientation::AsStored));
        decoded.unwrap();
        let reserved = budget.peak();
        assert!(real <= reserved, "{name}: {real} of {reserved}");
        // TIFF stands apart: there are too many kinds of it.
        let most = if name.starts_with("Tiff") { real * 4 } else { real * 2 };
        assert!(reserved <= most + (4 << 20), "{name}: {real} of {reserved}");
    }
}

/// A number of `/proc/self/status`, in bytes.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn what_is_reserved_is_what_decoding_jpeg_takes_of_the_machine() {
    let _alone = ALONE.lock();
    // AddressSanitizer has memory of its own, and terabytes of addresses.
    if status("VmSize:") > 1 << 40 {
        return;
    }
    // What is freed is gone at once, and what is taken is new.
    // SAFETY: sets a number; the allocator may be called by any thread.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 16) };
    let mut files = pictures();
    files.retain(|(_, bytes)| is_jpeg(bytes));
    files.push(("large".to_owned(), encoded((4000, 3000), Color::Rgb8, Format::Jpeg)));
    files.push(("wide".to_owned(), encoded((20_000, 200), Color::Rgb8, Format::Jpeg)));
    // Profiles without end behind the picture.
    let mut profiles = encoded((64, 64), Color::Rgb8, Format::Jpeg);
    let end = profiles.len() - 2;
    profiles.splice(end..end, b"\xff\xe2\0\x02".repeat(1 << 20));
    files.push(("profiles".to_owned(), profiles));
    assert!(files.len() >= 7);
    for (name, bytes) in files {
        let budget = Budget::new(0);
        let limits = DecodeLimits { budget: Some(budget.clone()), ..DecodeLimits::default() };
        // The highest mark becomes what there is now.
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = status("VmHWM:");
        let decoded = decode(&bytes, &limits, Orientation::AsStored).map(drop);
        let real = status("VmHWM:") - before;
        decoded.unwrap();
        let reserved = budget.peak();
        assert!(real <= reserved + (1 << 19), "{name}: {real} of {reserved}");
        assert!(reserved <= real * 3 / 2 + (4 << 20), "{name}: {real} of {reserved}");
    }
}

#[test]
fn many_at_once_take_what_the_budget_has() {
    const LIMIT: u64 = 40 << 20;
    let _alone = ALONE.lock();
    let size = (2000, 2000);
    let pictures = [
        encoded(size, Color::Rgba8, Format::Png),
        encoded(size, Color::Rgb8, Format::WebP),
        encoded(size, Color::Rgb8, Format::Gif),
        encoded(size, Color::L8, Format::Png),
    ];
    assert!(pictures.iter().all(|picture| picture.len() < 100_000));
    let budget = Budget::new(LIMIT);
    let limits = DecodeLimits { budget: Some(budget.clone()), ..DecodeLimits::default() };
    let ((), real) = peak(|| {
        thread::scope(|scope| {
            for picture in pictures.iter().cycle().take(12) {
                scope.spawn(|| {
                    let decoded = decode(picture, &limits, Orientation::AsStored).unwrap();
                    resize_bicubic(&decoded, 768, 768)
                });
            }
        });
    });
    assert!(budget.peak() <= LIMIT, "{}", budget.peak());
    // Besides, each thread has the picture that it makes, of 1.7 MB, and its stack.
    assert!(real <= LIMIT + (24 << 20), "{real}");
    assert_eq!(budget.used(), 0);
}

#[test]
fn a_large_picture_in_a_small_file_is_decoded_no_longer_than_wanted() {
    let _alone = ALONE.lock();
    for format in [Format::Png, Format::Gif, Format::WebP] {
        let picture = encoded((9000, 9000), Color::Rgb8, format);
        let limits = DecodeLimits::default();
        let (decoded, told) = thread::scope(|scope| {
            let stopper = scope.spawn(|| {
                thread::sleep(Duration::from_millis(20));
                limits.stop.stop();
                Instant::now()
            });
            let decoded = decode(&picture, &limits, Orientation::AsStored);
            (decoded, stopper.join().unwrap())
        });
        // A fast machine may have decoded it before.
        if let Err(problem) = decoded {
            assert!(problem.to_string().ends_with("interrupted"), "{format:?}: {problem}");
        }
        assert!(told.elapsed() < Duration::from_secs(5), "{format:?}: {:?}", told.elapsed());
    }
}

/// Bits, the lowest first.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    count: usize,
}

impl Bits {
    fn put(&mut self, value: u32, bits: usize) {
        for i in 0..bits {
            if self.count.is_multiple_of(8) {
                self.bytes.push(0);
            }
            let bit = u8::from(value >> i & 1 == 1) << (self.count % 8);
            *self.bytes.last_mut().unwrap() |= bit;
            self.count += 1;
        }
    }

    /// A prefix code of one symbol.
    fn put_single(&mut self, symbol: u32) {
        self.put(0b101, 3);
        self.put(symbol, 8);
    }

    /// A prefix code of symbols with 1, 2, .. 9, 10 and 10 bits, whose table has 1024 entries.
    fn put_long(&mut self) {
        self.put(0, 1);
        self.put(10, 4);
        // Of the lengths themselves: 3 bits for 1 to 6, 4 bits for 7 to 10.
        for bits in [0, 0, 0, 3, 3, 3, 3, 3, 0, 3, 4, 4, 4, 4] {
            self.put(bits, 3);
        }
        // Eleven follow, a number of four bits.
        self.put(1, 1);
        self.put(1, 3);
        self.put(9, 4);
        for length in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10_u32] {
            let (code, bits) = if length <= 6 { (length - 1, 3) } else { (length + 5, 4) };
            self.put(code.reverse_bits() >> (32 - bits), bits);
        }
    }
}

#[test]
fn a_lossless_webp_of_nothing_but_codes_is_reserved_for() {
    const GROUPS: u32 = 2048;
    let _alone = ALONE.lock();
    let mut bits = Bits::default();
    bits.put(0x2f, 8);
    bits.put(3, 14);
    bits.put(3, 14);
    // No alpha, version 0, no transform, no colour cache; codes by blocks of 4x4.
    bits.put(0, 6);
    bits.put(1, 4);
    // Which codes: a picture of one pixel.
    bits.put(0, 1);
    for symbol in [(GROUPS - 1) & 0xff, (GROUPS - 1) >> 8, 0, 0, 0] {
        bits.put_single(symbol);
    }
    for _ in 0..GROUPS * 5 {
        bits.put_long();
    }
    bits.put(0, 32);
    bits.bytes.extend([0; 64]);
    let chunk = |name: &[u8], data: &[u8]| {
        [name, &u32::try_from(data.len()).unwrap().to_le_bytes(), data].concat()
    };
    let file = chunk(b"RIFF", &[b"WEBP", chunk(b"VP8L", &bits.bytes).as_slice()].concat());
    let budget = Budget::new(0);
    let limits = DecodeLimits { budget: Some(budget.clone()), ..DecodeLimits::default() };
    let (decoded, real) = peak(|| decode(&file, &limits, Orientation::AsStored).map(drop));
    decoded.unwrap();
    // A table of each code was there.
    assert!(real >= u64::from(GROUPS) * 5 * 4096, "{real}");
    assert!(real <= budget.peak(), "{real} of {}", budget.peak());
}
