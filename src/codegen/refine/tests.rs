//! What a search finds, of whole graphs whose times are made up.

use super::*;

fn entry(key: &str, steps: usize, times: &[(&str, f64)]) -> Entry {
    let candidates = times.iter().map(|(name, us)| ((*name).to_owned(), *us)).collect();
    Entry { key: key.into(), steps, candidates, fixed: None }
}

/// Runs a search in which a graph takes what `us` says of its choices.
fn search(entries: &[Entry], us: impl Fn(&BTreeMap<String, String>) -> Option<f64>) -> Refined {
    search_with(entries, &[], us)
}

fn search_with(entries: &[Entry], order: &[&str], us: impl Fn(&BTreeMap<String, String>) -> Option<f64>) -> Refined {
    let order: Vec<String> = order.iter().map(|&key| key.to_owned()).collect();
    let mut search = Refinement::new(entries, &order);
    let mut most = search.left() + 1;
    while let Some(tactics) = search.next() {
        assert!(most > 0, "more graphs than were left");
        most -= 1;
        search.record(us(&tactics.chosen));
    }
    search.finish()
}

fn problems() -> [Entry; 2] {
    [
        entry("head", 1, &[("a", 50.0), ("b", 40.0), ("c", 200.0)]),
        entry("ffn", 22, &[("wide", 10.0), ("narrow", 8.0), ("deep", 9.0)]),
    ]
}

#[test]
fn what_makes_the_graph_faster_stays() {
    // By itself `narrow` is fastest, in the graph `deep` is; `b` is fastest in both.
    let found = search(&problems(), |chosen| {
        let ffn = [("wide", 10.0), ("narrow", 11.0), ("deep", 7.0)];
        let ffn = ffn.iter().find(|(name, _)| *name == chosen["ffn"]).map(|(_, us)| us);
        Some(22.0 * ffn? + if chosen["head"] == "b" { 40.0 } else { 50.0 })
    });
    assert_eq!((found.chosen["ffn"].as_str(), found.chosen["head"].as_str()), ("deep", "b"));
    assert_eq!((found.default_us, found.us), (270.0, 194.0));
}

#[test]
fn more_is_tried_of_what_many_layers_have() {
    let names = ["a", "b", "c", "d", "e", "f"];
    let times = names.map(|name| (name, 5.0));
    // The last one is the fastest in company.
    let us = |chosen: &BTreeMap<String, String>| Some(if chosen["x"] == "f" { 80.0 } else { 100.0 });
    assert_eq!(search(&[entry("x", LAYERS, &times)], us).chosen["x"], "f");
    assert_ne!(search(&[entry("x", LAYERS - 1, &times)], us).chosen["x"], "f");
}

#[test]
fn the_defaults_stay_where_nothing_is_faster() {
    let found = search(&problems(), |_| Some(100.0));
    assert_eq!((found.chosen["ffn"].as_str(), found.chosen["head"].as_str()), ("wide", "a"));
    // Defaults, the fastest of each, and five single changes; `c` is too slow to be tried.
    assert_eq!(found.timed, 2 + 2 + 1);
}

#[test]
fn a_kernel_that_pays_only_among_its_kind_is_found() {
    let entries = [
        entry("head", 1, &[("stream 1", 50.0), ("ring 1", 51.0)]),
        entry("ffn", 22, &[("stream 1", 10.0), ("ring 1", 12.0), ("ring 2", 11.0)]),
        entry("conv", 18, &[("other", 3.0)]),
    ];
    let found = search(&entries, |chosen| {
        let ring = ["head", "ffn"].map(|key| chosen[key].starts_with("ring"));
        Some(if ring == [true, true] { 80.0 } else { 100.0 + f64::from(u8::from(ring[0] || ring[1])) })
    });
    assert_eq!((found.chosen["ffn"].as_str(), found.chosen["conv"].as_str()), ("ring 2", "other"));
    assert_eq!(found.us, 80.0);
}

#[test]
fn neighbours_are_tried_together() {
    let entries = [
        entry("up", 22, &[("large", 10.0), ("small", 12.0)]),
        entry("down", 22, &[("few", 5.0), ("many", 6.0)]),
        entry("conv", 18, &[("x", 5.0), ("y", 5.0)]),
    ];
    // A small kernel pays only where the other one uses what it leaves.
    let us = |chosen: &BTreeMap<String, String>| {
        Some(match (chosen["up"].as_str(), chosen["down"].as_str()) {
            ("small", "many") => 80.0,
            ("large", "few") => 100.0,
            _ => 110.0,
        })
    };
    let order = ["conv", "up", "down", "conv", "up", "down"];
    let found = search_with(&entries, &order, us);
    assert_eq!((found.chosen["up"].as_str(), found.chosen["down"].as_str(), found.us), ("small", "many", 80.0));
    // Not neighbours, so nothing is found.
    assert_eq!(search_with(&entries, &["up", "conv", "down"], us).us, 100.0);
    assert_eq!(search(&entries, us).us, 100.0);
}

#[test]
fn a_graph_that_does_not_run_is_not_chosen() {
    let found = search(&problems(), |chosen| (chosen["ffn"] != "wide").then_some(5.0));
    assert_eq!(found.chosen["ffn"], "narrow");
    assert_eq!((found.default_us, found.us), (f64::INFINITY, 5.0));
}

#[test]
fn fused_operators_are_taken_apart_where_that_pays() {
    let entries = ["head", "conv", "attention"].map(Entry::fusion);
    let found = search(&entries, |chosen| {
        assert!(chosen.values().all(|name| name == APART), "nothing is said of what stays together");
        let us = |key: &str, gain: f64| if chosen.contains_key(key) { -gain } else { 0.0 };
        Some(1000.0 + us("head", 100.0) + us("conv", 50.0) + us("attention", -20.0))
    });
    let apart: Vec<&str> =
        found.chosen.iter().filter(|(_, name)| *name == APART).map(|(key, _)| key.as_str()).collect();
    assert_eq!((apart, found.us), (vec!["conv", "head"], 850.0));
}

#[test]
fn what_was_fused_last_is_taken_apart_first() {
    let keys = ["gather+norm+matmul 1", "norm+matmul 2", "norm+matmul+shortconv 3", "matmul+shortconv 4"];
    let keys: BTreeSet<String> = keys.map(str::to_owned).into();
    let last = last_fused(keys.iter());
    assert_eq!(last, ["gather+norm+matmul 1", "matmul+shortconv 4", "norm+matmul+shortconv 3"]);
    assert_eq!(last_fused(keys.iter().filter(|key| !last.contains(key))), ["norm+matmul 2"]);
    assert!(last_fused([].iter()).is_empty());
}

#[test]
fn choices_of_other_buckets_stay() {
    let mut entries = problems();
    entries[1].fixed = Some("narrow".into());
    let found = search(&entries, |chosen| {
        assert_eq!(chosen["ffn"], "narrow");
        Some(1.0)
    });
    assert_eq!(found.chosen["head"], "a");
}
