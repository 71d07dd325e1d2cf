//! Profiles for a trace viewer: `chrome://tracing`, or ui.perfetto.dev.

use serde_json::{Value, json};

use super::profile::{Profile, StepProfile, layer};

/// A profile as a Chrome trace: an array of complete events, times in microseconds. Steps stand one after the other, each as
/// long as it takes by itself; in the graph, neighbours overlap.
pub fn chrome_trace(profile: &Profile) -> Value {
    let mut now = 0.0;
    let events = profile.steps.iter().map(|step| {
        let event = event(step, now);
        now += step.us;
        event
    });
    Value::Array(events.collect())
}

fn event(step: &StepProfile, start: f64) -> Value {
    json!({
        "name": step.name,
        "cat": layer(&step.name),
        "ph": "X",
        "ts": start,
        "dur": step.us,
        "pid": 0,
        "tid": 0,
        "args": {
            "kernel": step.kernel,
            "grid": step.grid,
            "block": step.block,
            "registers": step.registers,
            "shared": step.shared,
            "blocks_per_multiprocessor": step.blocks_per_multiprocessor,
            "bytes": step.work.bytes,
            "flops": step.work.flops,
            "floor_us": step.floor_us,
            "in_graph_us": step.in_graph_us,
            "fraction_of_floor": step.fraction,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::cuda::measure::profile::tests::step;
    use crate::runtime::cuda::measure::{Times, Work};

    #[test]
    fn events_follow_each_other() {
        let profile = Profile {
            bucket: "decode_1".into(),
            rows: 1,
            context: 0,
            steps: vec![step("embed.embed", 2.5, 1.0), step("layers.0.conv.norm+matmul", 4.0, 2.0)],
            steps_us: 6.5,
            mark_us: 1.0,
            graph: Times::of(vec![]),
            graph_less_steps_us: 0.0,
            transfer: None,
            work: Work::default(),
            floor_us: 0.0,
            fraction: 0.0,
            experts: None,
        };
        let trace = chrome_trace(&profile);
        let events = trace.as_array().expect("an array of events");
        let spans: Vec<(f64, f64)> =
            events.iter().map(|e| (e["ts"].as_f64().expect("a time"), e["dur"].as_f64().expect("a time"))).collect();
        assert_eq!(spans, [(0.0, 2.5), (2.5, 4.0)]);
        assert!(events.iter().all(|event| event["ph"] == "X"));
        assert_eq!((&events[1]["cat"], &events[1]["args"]["bytes"]), (&"layers.0".into(), &2.0.into()));
    }
}
