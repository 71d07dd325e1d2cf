//! CUDA graphs, captured from streams.
#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys;

use super::driver::{Device, DeviceError, Stream, during};

/// An instantiated graph.
#[derive(Debug)]
pub struct Graph {
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
    /// Its nodes.
    pub nodes: usize,
    device: Arc<Device>,
}

// SAFETY: as of the device.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `work` queues on the stream, and on streams that it makes wait for this one and this one for.
    ///
    /// # Errors
    /// What `work` returns, or the driver refused.
    pub fn capture<E: From<DeviceError>>(stream: &Stream, work: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let _nobody_waits = stream.device.captures.begin();
        // SAFETY: the stream is alive; the graph is destroyed once.
        unsafe {
            during("beginning a capture", result::stream::begin_capture(stream.handle, mode))?;
            let worked = work();
            let graph = during("ending a capture", result::stream::end_capture(stream.handle));
            if let Err(error) = worked {
                if let Ok(graph) = graph {
                    let _ = result::graph::destroy(graph);
                }
                return Err(error);
            }
            let graph = graph?;
            let instantiated = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let executable = during("instantiating a graph", instantiated).inspect_err(|_| {
                let _ = result::graph::destroy(graph);
            })?;
            let mut nodes = 0;
            let counted = sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut nodes).result();
            let graph = Graph { graph, executable, nodes, device: Arc::clone(&stream.device) };
            during("counting a graph's nodes", counted)?;
            during("uploading a graph", result::graph::upload(graph.executable, stream.handle))?;
            Ok(graph)
        }
    }

    /// Queues all of its work.
    ///
    /// # Errors
    /// The driver failed.
    pub fn launch(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: both are alive.
        during("launching a graph", unsafe { result::graph::launch(self.executable, stream.handle) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: each destroyed once; runs in progress finish.
        unsafe {
            let _ = result::graph::exec_destroy(self.executable);
            let _ = result::graph::destroy(self.graph);
        }
    }
}
