//! How ranks find each other for [`watch`](super::watch): rank 0 listens, and tells where through the transport.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::watch::{Link, Peer};
use super::{NAP, Transport};

/// How long all of it may take.
const DEADLINE: Duration = Duration::from_secs(8);
/// How long a connection may take to be made, or to say whose it is.
const PATIENCE: Duration = Duration::from_secs(1);

/// What rank 0 answers to a rank that says hello; then, when all are there, or not in time.
const KNOWN: &[u8; 8] = b"a rank!\n";
const WELCOME: &[u8; 8] = b"welcome\n";
const FAILED: &[u8; 8] = b"failed.\n";

/// Where rank 0 is.
#[derive(Serialize, Deserialize)]
struct Address {
    peer: Peer,
    port: u16,
    /// Addresses besides the host's name.
    addresses: Vec<IpAddr>,
    /// What those who connect have to say, so that nobody else is taken for a rank.
    key: String,
}

/// What a rank says first.
#[derive(Serialize, Deserialize)]
struct Hello {
    peer: Peer,
    key: String,
}

/// Connects rank 0 with all others; gives this rank's links and what it knows of the ranks, by number. `own` are addresses of this host.
///
/// # Errors
/// Not all are there in time.
pub fn connect(transport: &mut dyn Transport, host: &str, own: Vec<IpAddr>) -> Result<(Vec<Link>, Vec<Peer>)> {
    let me = Peer { rank: transport.rank(), host: host.to_owned(), pid: std::process::id() };
    let mut peers: Vec<Peer> = (0..transport.size()).map(Peer::unknown).collect();
    peers[me.rank] = me.clone();
    let deadline = Instant::now() + DEADLINE;
    if me.rank > 0 {
        let link = call(transport, me, deadline)?;
        peers[0] = link.peer().clone();
        return Ok((vec![link], peers));
    }
    let listener = TcpListener::bind("0.0.0.0:0").context("cannot listen on a TCP port for the other ranks")?;
    let key = key();
    let address = Address { peer: me, port: listener.local_addr()?.port(), addresses: own, key: key.clone() };
    let bytes = serde_json::to_vec(&address)?;
    (1..peers.len()).try_for_each(|to| transport.send(to, bytes.clone()))?;
    let mut links = accept(transport, &listener, &key, deadline)?;
    links.sort_by_key(|link| link.peer().rank);
    for link in &links {
        peers[link.peer().rank] = link.peer().clone();
    }
    Ok((links, peers))
}

/// Rank 0's side: takes a connection of each of the others.
fn accept(transport: &mut dyn Transport, listener: &TcpListener, key: &str, deadline: Instant) -> Result<Vec<Link>> {
    let size = transport.size();
    listener.set_nonblocking(true)?;
    let mut there: Vec<(Peer, TcpStream)> = vec![];
    while there.len() + 1 < size {
        // That also sends the address on its way.
        if let Some((from, _)) = transport.receive()? {
            bail!("rank {from} has sent something before all are connected; this is a bug");
        }
        match listener.accept() {
            Ok((stream, _)) => {
                let Ok(Some(peer)) = greet(&stream, key, deadline) else { continue };
                if peer.rank > 0 && peer.rank < size && there.iter().all(|(other, _)| other.rank != peer.rank) {
                    there.push((peer, stream));
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => sleep(NAP),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("cannot take connections of the other ranks"),
        }
        if Instant::now() > deadline {
            let is_missing = |rank: &usize| there.iter().all(|(peer, _)| peer.rank != *rank);
            let missing: Vec<String> = (1..size).filter(is_missing).map(|rank| rank.to_string()).collect();
            for (_, stream) in &mut there {
                let _ = stream.write_all(FAILED);
            }
            bail!(
                "rank {}: expected a TCP connection to rank 0 within {} s, found none; the process was stopped or has ended, or a \
                 firewall stands between the hosts",
                missing.join(", "),
                DEADLINE.as_secs()
            );
        }
    }
    let link = |(peer, mut stream): (Peer, TcpStream)| {
        stream.write_all(WELCOME)?;
        Link::new(peer, stream)
    };
    Ok(there.into_iter().map(link).collect::<std::io::Result<_>>()?)
}

/// Who has connected, if it is a rank.
fn greet(stream: &TcpStream, key: &str, deadline: Instant) -> Result<Option<Peer>> {
    let left = deadline.saturating_duration_since(Instant::now()).min(PATIENCE);
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
    let mut line = String::new();
    // A rank says nothing more until it is answered, so no byte is read too far.
    BufReader::new(std::io::Read::take(stream, 4096)).read_line(&mut line)?;
    let hello: Hello = serde_json::from_str(&line)?;
    if hello.key != key {
        return Ok(None);
    }
    let mut stream = stream;
    stream.write_all(KNOWN)?;
    Ok(Some(hello.peer))
}

/// The others' side: connects to rank 0.
fn call(transport: &mut dyn Transport, me: Peer, deadline: Instant) -> Result<Link> {
    let bytes = loop {
        if let Some((0, bytes)) = transport.receive()? {
            break bytes;
        }
        if Instant::now() > deadline {
            bail!(
                "rank 0: expected its address within {} s, found nothing; the process was stopped",
                DEADLINE.as_secs()
            );
        }
        sleep(NAP);
    };
    let Address { peer, port, addresses, key } =
        serde_json::from_slice(&bytes).context("rank 0: expected its address, found something else")?;
    let mut candidates: Vec<SocketAddr> = vec![];
    if peer.host == me.host {
        candidates.push((IpAddr::from([127, 0, 0, 1]), port).into());
    }
    candidates.extend(addresses.into_iter().map(|address| SocketAddr::from((address, port))));
    candidates.extend((peer.host.as_str(), port).to_socket_addrs().into_iter().flatten());
    let hello = serde_json::to_string(&Hello { peer: me, key })? + "\n";
    let mut tried: Vec<String> = vec![];
    while Instant::now() < deadline {
        for address in &candidates {
            match reach(address, &hello) {
                Ok(stream) => return welcomed(peer, stream, deadline),
                Err(error) => tried.push(format!("{address}: {error}")),
            }
        }
        sleep(100 * NAP);
    }
    tried.sort();
    tried.dedup();
    bail!(
        "{peer}: expected a TCP connection within {} s, found none ({}); open the ports between the hosts, or see that they know each \
         other's names",
        DEADLINE.as_secs(),
        tried.join("; ")
    )
}

/// Waits until rank 0 says that all are there. The error is empty where rank 0 tells why they are not.
fn welcomed(peer: Peer, mut stream: TcpStream, deadline: Instant) -> Result<Link> {
    stream.set_read_timeout(Some(deadline.saturating_duration_since(Instant::now()) + PATIENCE))?;
    let mut answer = [0; 8];
    match std::io::Read::read_exact(&mut stream, &mut answer) {
        Ok(()) if &answer == WELCOME => Ok(Link::new(peer, stream)?),
        Ok(()) => bail!(""),
        Err(_) => bail!("{peer}: expected that all ranks are connected, found that it was stopped or has ended"),
    }
}

fn reach(address: &SocketAddr, hello: &str) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(hello.as_bytes())?;
    let mut answer = [0; 8];
    std::io::Read::read_exact(&mut stream, &mut answer)?;
    if &answer != KNOWN {
        return Err(std::io::Error::other("somebody else answers there"));
    }
    Ok(stream)
}

/// Something that no other run says.
fn key() -> String {
    use std::hash::{BuildHasher, RandomState};
    let half = || RandomState::new().hash_one((std::process::id(), std::time::SystemTime::now()));
    format!("{:016x}{:016x}", half(), half())
}
