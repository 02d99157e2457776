//! The language model's kernels: attention over sequences and histories, and what a search needs.

mod common;

use common::{
    Number, addresses, assert_near, dot, in_both_orders, index, input, int, list, made, maybe,
    narrow, output, plus, run_forwards, unwritten, values, weighed,
};
use florence_cuda::geometry;
use half::bf16;

/// Attention of a query, its bias and scale not yet in it, over rows of `d` elements: each head on
/// its own.
fn attention(query: &[f64], keys: &[f64], values: &[f64], heads: usize) -> Vec<f64> {
    let (d, k) = (query.len(), query.len() / heads);
    let part = |rows: &[f64], head: usize| -> Vec<Vec<f64>> {
        rows.chunks(d).map(|row| row[head * k..(head + 1) * k].to_vec()).collect()
    };
    (0..heads)
        .flat_map(|head| {
            let query = &query[head * k..(head + 1) * k];
            let scores: Vec<f64> =
                part(keys, head).iter().map(|key| dot(query, key) / (k as f64).sqrt()).collect();
            weighed(&scores, &part(values, head))
        })
        .collect()
}

/// Scores are to differ by more than one.
fn wide<T: Number>(seed: u64, count: usize) -> Vec<T> {
    made::<f32>(seed, count).into_iter().map(|x| T::round(x * 3.0)).collect()
}

/// Keys and values of sequences.
struct Sequences<T> {
    keys: Vec<Vec<T>>,
    values: Vec<Vec<T>>,
    d: usize,
    heads: usize,
}

impl<T: Number> Sequences<T> {
    fn made(lengths: &[usize], d: usize, heads: usize) -> Self {
        let all = |seed: u64| {
            let one = |(i, length): (u64, &usize)| wide(seed + i, length * d);
            (0..).zip(lengths).map(one).collect()
        };
        Self { keys: all(100), values: all(200), d, heads }
    }

    /// Rows of queries, each with the sequence that it looks at.
    fn attend(&self, q: &[T], q_bias: &[f32], of_row: &[usize]) -> Vec<T> {
        let starts = |of: &[Vec<T>]| addresses(&of.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let (keys, values) = (starts(&self.keys), starts(&self.values));
        let lengths: Vec<i32> = self.keys.iter().map(|keys| narrow(keys.len() / self.d)).collect();
        let of: Vec<i32> = of_row.iter().map(|of| narrow(*of)).collect();
        in_both_orders::<T, _>(|run| {
            let (rows, d, heads) = (of.len(), self.d, self.heads);
            let mut out = unwritten::<T>(rows * d);
            let args = [
                input(q),
                input(q_bias),
                list(&keys),
                list(&values),
                input(&lengths),
                input(&of),
                output(&mut out),
                int(rows),
                int(d),
                int(heads),
            ];
            let launch = geometry::sequence_attention(rows, self.keys.len(), heads, d / heads);
            run("sequence_attention", launch, &args);
            out
        })
    }
}

fn sequences<T: Number>(lengths: &[usize], of_row: &[usize], d: usize, heads: usize) {
    let sequences = Sequences::<T>::made(lengths, d, heads);
    let (q, q_bias) = (wide::<T>(1, of_row.len() * d), made::<f32>(2, d));
    let out = sequences.attend(&q, &q_bias, of_row);
    let exact: Vec<f64> = (0..of_row.len())
        .flat_map(|row| {
            let query = plus(&values(&q[row * d..(row + 1) * d]), &values(&q_bias));
            let of = of_row[row];
            let (keys, values) = (values(&sequences.keys[of]), values(&sequences.values[of]));
            attention(&query, &keys, &values, heads)
        })
        .collect();
    assert_near(&out, &exact, 3e-5);
}

#[test]
fn sequence_attention_is_the_formula() {
    let encoder: Vec<usize> =
        [7, 1, 65].iter().enumerate().flat_map(|(i, n)| vec![i; *n]).collect();
    for (lengths, of_row, d, heads) in [
        (&[1][..], &[0][..], 32, 1),
        (&[7, 1, 65], &encoder, 128, 2),
        (&[577, 1029], &[0, 0, 0, 1, 1, 1], 128, 2),
        // Rows of a sequence that do not follow each other, more runs than sequences.
        (&[64, 9], &[0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1], 32, 2),
        // A block's warps go from one run to the next.
        (&[70, 9], &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], 32, 2),
        (&[3; 20], &(0..20).collect::<Vec<_>>(), 96, 3),
        (&[130], &[0; 35], 36, 1),
        (&[100], &[0; 5], 8, 2),
        (&[70], &[0; 17], 1024, 16),
    ] {
        sequences::<f32>(lengths, of_row, d, heads);
        sequences::<bf16>(lengths, of_row, d, heads);
    }
}

#[test]
fn an_encoder_of_the_published_length_is_the_formula() {
    sequences::<f32>(&[577], &[0; 577], 64, 1);
}

fn rows_alone<T: Number>() {
    let (lengths, d, heads) = ([577, 7, 130], 128, 2);
    let of_row: Vec<usize> = [0, 2, 2, 1].into_iter().chain([0; 21]).chain([2; 3]).collect();
    let sequences = Sequences::<T>::made(&lengths, d, heads);
    let (q, q_bias) = (wide::<T>(1, of_row.len() * d), made::<f32>(2, d));
    let all = sequences.attend(&q, &q_bias, &of_row);
    for row in [0, 2, 3, 4, 20, 24, 27] {
        let at = row * d..(row + 1) * d;
        let alone = sequences.attend(&q[at.clone()], &q_bias, &of_row[row..=row]);
        assert_eq!(alone, all[at], "row {row}");
    }
}

#[test]
fn a_row_attends_alone_as_in_company() {
    rows_alone::<f32>();
    rows_alone::<bf16>();
}

/// A layer's arenas, and what rows have seen.
struct Histories<T> {
    arenas: [Vec<T>; 2],
    seen: Vec<Vec<i32>>,
    d: usize,
    heads: usize,
}

impl<T: Number> Histories<T> {
    /// Histories of these lengths, over slots in no order; all share some.
    fn made(counts: &[usize], d: usize, heads: usize) -> Self {
        const SLOTS: usize = 1031;
        let slot = |row: usize, i: usize| narrow((i * 577 + row % 3) % SLOTS);
        let seen = |(row, count): (usize, &usize)| (0..*count).map(|i| slot(row, i)).collect();
        Self {
            arenas: [wide(1, SLOTS * d), wide(2, SLOTS * d)],
            seen: counts.iter().enumerate().map(seen).collect(),
            d,
            heads,
        }
    }

    fn attend(&self, q: &[T], q_bias: &[f32], rows: &[usize]) -> Vec<T> {
        let seen: Vec<&[i32]> = rows.iter().map(|row| self.seen[*row].as_slice()).collect();
        let seen = addresses(&seen);
        let count = |row: &usize| narrow(self.seen[*row].len());
        let counts: Vec<i32> = rows.iter().map(count).collect();
        in_both_orders::<T, _>(|run| {
            let mut out = unwritten::<T>(rows.len() * self.d);
            let args = [
                input(q),
                input(q_bias),
                input(&self.arenas[0]),
                input(&self.arenas[1]),
                list(&seen),
                input(&counts),
                output(&mut out),
                int(rows.len()),
                int(self.d),
                int(self.heads),
            ];
            let launch = geometry::history_attention(rows.len(), self.heads, self.d / self.heads);
            run("history_attention", launch, &args);
            out
        })
    }
}

fn histories<T: Number>(counts: &[usize], d: usize, heads: usize) {
    let histories = Histories::<T>::made(counts, d, heads);
    let rows: Vec<usize> = (0..counts.len()).collect();
    let (q, q_bias) = (wide::<T>(3, rows.len() * d), made::<f32>(4, d));
    let out = histories.attend(&q, &q_bias, &rows);
    let exact: Vec<f64> = rows
        .iter()
        .flat_map(|row| {
            let query = plus(&values(&q[row * d..(row + 1) * d]), &values(&q_bias));
            let [keys, values] = histories.arenas.each_ref().map(|arena| -> Vec<f64> {
                let slots = histories.seen[*row].iter().map(|slot| index(*slot));
                slots.flat_map(|slot| values(&arena[slot * d..(slot + 1) * d])).collect()
            });
            attention(&query, &keys, &values, heads)
        })
        .collect();
    assert_near(&out, &exact, 3e-5);
    for row in rows {
        let at = row * d..(row + 1) * d;
        assert_eq!(histories.attend(&q[at.clone()], &q_bias, &[row]), out[at], "row {row} alone");
    }
}

#[test]
fn history_attention_is_the_formula_and_rows_are_on_their_own() {
    for (counts, d, heads) in [
        (&[1, 7, 32, 33, 1029][..], 128, 2),
        (&[129, 1, 128], 32, 2),
        (&[5], 1024, 16),
        (&[40, 577], 36, 1),
    ] {
        histories::<f32>(counts, d, heads);
        histories::<bf16>(counts, d, heads);
    }
}

fn appended<T: Number>(rows: usize, d: usize) {
    let (k, v) = (made::<T>(1, rows * d), made::<T>(2, rows * d));
    let (k_bias, v_bias) = (made::<f32>(3, d), made::<f32>(4, d));
    let slots: Vec<usize> = (0..rows).map(|row| (row * 5 + 2) % (rows + 1)).collect();
    let ints: Vec<i32> = slots.iter().map(|slot| narrow(*slot)).collect();
    let before = made::<T>(5, (rows + 1) * d);
    let arenas = in_both_orders::<T, _>(|run| {
        let mut arenas = [before.clone(), before.clone()];
        let [arena_k, arena_v] = &mut arenas;
        let args = [
            input(&k),
            input(&v),
            input(&k_bias),
            input(&v_bias),
            output(arena_k),
            output(arena_v),
            input(&ints),
            int(rows),
            int(d),
        ];
        run("history_append", geometry::history_append(rows, d), &args);
        arenas
    });
    for (arena, (x, bias)) in arenas.iter().zip([(&k, &k_bias), (&v, &v_bias)]) {
        for slot in 0..=rows {
            let got = &arena[slot * d..(slot + 1) * d];
            if let Some(row) = slots.iter().position(|other| *other == slot) {
                let exact = plus(&values(&x[row * d..(row + 1) * d]), &values(bias));
                assert_near(got, &exact, 1e-7);
            } else {
                assert_eq!(got, &before[slot * d..(slot + 1) * d]);
            }
        }
    }
}

#[test]
fn keys_and_values_go_to_their_slots_and_no_others() {
    for (rows, d) in [(1, 32), (3, 96), (256, 128), (48, 1024)] {
        appended::<f32>(rows, d);
        appended::<bf16>(rows, d);
    }
}

#[test]
fn slots_beyond_the_reach_of_an_int_are_found() {
    // 2.2e9 elements, of which only the last pages are ever touched.
    let (d, slot) = (1024, 2_150_000usize);
    let mut arena = vec![0u16; (slot + 1) * d];
    let (x, bias) = (made::<bf16>(1, d), vec![0.0f32; d]);
    let (slots, counts) = ([narrow(slot)], [1]);
    let launch = geometry::history_append(1, d);
    let arena_at = output(&mut arena);
    let (x_at, bias_at) = (input(&x), input(&bias));
    let args = [x_at, x_at, bias_at, bias_at, arena_at, arena_at, input(&slots), int(1), int(d)];
    run_forwards::<bf16>("history_append", launch, &args);
    let mut out = unwritten::<bf16>(d);
    let seen = addresses(&[&slots]);
    let args = [
        x_at,
        bias_at,
        arena_at,
        arena_at,
        list(&seen),
        input(&counts),
        output(&mut out),
        int(1),
        int(d),
        int(16),
    ];
    run_forwards::<bf16>("history_attention", geometry::history_attention(1, 16, 64), &args);
    assert_eq!(out, x, "the average of one value is the value");
}

/// Sum's logarithm, values and ids.
type Top = (Vec<f32>, Vec<f32>, Vec<i32>);

fn top_k(logits: &[f32], bias: Option<&[f32]>, vocabulary: usize, k: usize) -> Top {
    let rows = logits.len() / vocabulary;
    in_both_orders::<f32, _>(|run| {
        let mut top = (unwritten(rows), unwritten(rows * k), vec![i32::MIN; rows * k]);
        let outputs = [output(&mut top.0), output(&mut top.1), output(&mut top.2)];
        let inputs = [input(logits), maybe(bias)];
        let sizes = [rows, vocabulary, k].map(int);
        run("top_k", geometry::top_k(rows), &[&inputs[..], &outputs, &sizes].concat());
        top
    })
}

/// The formula of [`top_k`], for one row.
fn top_k_exactly(logits: &[f32], k: usize) -> (f64, Vec<(f32, i32)>) {
    let clean = logits.iter().map(|x| if x.is_nan() { f32::NEG_INFINITY } else { *x });
    let mut words: Vec<(f32, i32)> = clean.zip(0..).collect();
    words.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let most = f64::from(words[0].0);
    let sum: f64 = words.iter().rev().map(|(x, _)| (f64::from(*x) - most).exp()).sum();
    let log_sum = if most > f64::NEG_INFINITY { most + sum.ln() } else { most };
    words.resize(k.max(words.len()), (f32::NEG_INFINITY, -1));
    words.truncate(k);
    (log_sum, words)
}

#[track_caller]
fn assert_top(logits: &[f32], vocabulary: usize, k: usize) {
    let (log_sums, values, ids) = top_k(logits, None, vocabulary, k);
    for (row, logits) in logits.chunks(vocabulary).enumerate() {
        let (log_sum, words) = top_k_exactly(logits, k);
        let got = f64::from(log_sums[row]);
        let near = if log_sum.is_finite() { (got - log_sum).abs() < 1e-5 } else { got < f64::MIN };
        assert!(near, "{got} instead of {log_sum}");
        let at = row * k..(row + 1) * k;
        let got: Vec<(f32, i32)> =
            values[at.clone()].iter().copied().zip(ids[at].iter().copied()).collect();
        assert_eq!(got, words, "row {row} of {vocabulary} words");
    }
}

#[test]
fn top_k_finds_the_largest_and_the_sum() {
    for (rows, vocabulary, k) in [
        (1, 51_289, 64),
        (3, 51_289, 7),
        (2, 1711, 6),
        (3, 7, 7),
        (1, 7, 1),
        (2, 1024, 64),
        (1, 1025, 3),
    ] {
        let logits: Vec<f32> = made::<f32>(1, rows * vocabulary).iter().map(|x| x * 12.0).collect();
        assert_top(&logits, vocabulary, k);
    }
}

#[test]
fn top_k_prefers_the_lower_id_among_equals() {
    assert_top(&vec![0.25; 51_289], 51_289, 64);
    let few: Vec<f32> = (0..9000u16).map(|i| f32::from(i * 7919 % 5)).collect();
    assert_top(&few, 9000, 64);
    // Zeros of both signs are equal.
    let (_, _, ids) = top_k(&[-0.0, 0.0, -1.0, 0.0, -0.0], None, 5, 4);
    assert_eq!(ids, [0, 1, 3, 4]);
}

#[test]
fn top_k_takes_what_is_no_number_for_minus_infinity() {
    let mut logits = vec![f32::NEG_INFINITY; 3000];
    logits[2999] = 1.0;
    logits[5] = f32::NAN;
    logits[1024] = -2.0;
    assert_top(&logits, 3000, 5);
    assert_top(&[f32::NAN; 7], 7, 7);
    assert_top(&[f32::NEG_INFINITY; 2000], 2000, 64);
}

#[test]
fn places_beyond_the_vocabulary_are_empty() {
    let (_, values, ids) = top_k(&[1.0, 3.0, 2.0], None, 3, 5);
    assert_eq!(values, [3.0, 2.0, 1.0, f32::NEG_INFINITY, f32::NEG_INFINITY]);
    assert_eq!(ids, [1, 2, 0, -1, -1]);
}

#[test]
fn top_k_adds_the_bias() {
    let (logits, bias) = (made::<f32>(1, 2 * 1711), made::<f32>(2, 1711));
    let added: Vec<f32> =
        logits.chunks(1711).flat_map(|row| row.iter().zip(&bias).map(|(x, b)| x + b)).collect();
    assert_eq!(top_k(&logits, Some(&bias), 1711, 9), top_k(&added, None, 1711, 9));
}

#[test]
fn a_row_of_logits_is_searched_alone_as_in_company() {
    let logits: Vec<f32> = made::<f32>(1, 3 * 5000).iter().map(|x| x * 9.0).collect();
    let (log_sums, values, ids) = top_k(&logits, None, 5000, 6);
    for row in 0..3 {
        let alone = top_k(&logits[row * 5000..(row + 1) * 5000], None, 5000, 6);
        let at = row * 6..(row + 1) * 6;
        let expected =
            (log_sums[row..=row].to_vec(), values[at.clone()].to_vec(), ids[at].to_vec());
        assert_eq!(alone, expected);
    }
}
