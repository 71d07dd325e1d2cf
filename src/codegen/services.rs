//! The kernels that the runtime launches by itself, added to a plan: see [`crate::plan::ServiceRole`].

use super::cubins::Source;
use super::kernels::services;
use crate::plan::{Kernel, Manifest, Service};

/// Adds the services that a plan needs to its manifest, and their sources to those of its kernels.
pub fn add(manifest: &mut Manifest, sources: &mut Vec<Source>) {
    for service in services(manifest) {
        let source = Source { name: service.name.to_owned(), text: service.text() };
        manifest.services.push(Service(service.role, manifest.kernels.len() as u32));
        manifest.kernels.push(Kernel {
            name: source.name.clone(),
            config: String::new(),
            source: source.hash(manifest.target),
            params: service.specialised.params,
            cubin: None,
        });
        sources.push(source);
    }
}
