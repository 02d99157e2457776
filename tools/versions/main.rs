//! Both versions in turns; the least time of each part, in milliseconds.

fn cosine(x: &[f32], y: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| -> f64 {
        x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    };
    dot(x, y) / (dot(x, x) * dot(y, y)).sqrt()
}

fn main() {
    let [precision, threads, rounds] =
        std::array::from_fn(|i| std::env::args().nth(i + 1).unwrap());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.parse().unwrap());
    pool.build_global().unwrap();
    let (old, new) = (before::Network::new(&precision), after::Network::new(&precision));
    let mut least = [[f64::INFINITY; before::PARTS.len()]; 2];
    let mut found = [const { [const { Vec::new() }; 2] }; 2];
    // The first round warms up.
    for round in 0..=rounds.parse().unwrap() {
        for (i, (times, outputs)) in [old.run(), new.run()].into_iter().enumerate() {
            found[i] = outputs;
            for (least, time) in least[i].iter_mut().zip(times).filter(|_| round > 0) {
                *least = least.min(time);
            }
        }
    }
    let row = |what: &str, [before, after]: [f64; 2]| {
        println!("| {what} | {before:.1} | {after:.1} | {:.2} |", after / before);
    };
    println!("\n| {precision}, ms | before | after | ratio |\n|---|---|---|---|");
    for (name, parts, of) in [
        ("vision tower", 0..before::OF_THE_TOWER, 0),
        ("encoder", before::OF_THE_TOWER..before::PARTS.len(), 1),
    ] {
        for part in parts.clone() {
            row(&format!("{name}: {}", before::PARTS[part]), least.map(|least| least[part]));
        }
        row(name, least.map(|least| least[parts.clone()].iter().sum()));
        let [before, after] = &found;
        println!("| {name}: cosine | | {:.7} | |", cosine(&before[of], &after[of]));
    }
}
