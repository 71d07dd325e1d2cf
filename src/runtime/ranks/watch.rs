//! Sees to it that no rank waits for one that is no more: every process ends soon after any has ended, was stopped or failed.
//!
//! Rank 0 has a TCP connection to every other rank, and each end has a thread that does nothing else, so that a long step delays no
//! sign of life. Lines go both ways: `alive` twice a second, `goodbye` when all is done, `fail {...}` from a rank that cannot go on and
//! then from rank 0 to all, `ending` from one that a signal told to end. A connection that closes without a goodbye, as that of a killed process does at once, and one that is
//! silent for [`SILENCE`], as that of a stopped process or a lost host is, are failures too. Rank 0 tells what happened, once; the others
//! do only where rank 0 cannot be heard. Then the process ends, whatever its other threads are doing.
//!
//! Where all were told to end, as by Ctrl-C, nobody is at fault, and nothing is told.
//!
//! Silence is measured in the thread's own waking time, so that ranks which were all stopped and go on find nothing wrong.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// How often the thread looks.
const TICK: Duration = Duration::from_millis(20);
/// How often a rank says that it is alive.
const BEAT: Duration = Duration::from_millis(500);
/// How long one may say nothing.
pub const SILENCE: Duration = Duration::from_secs(5);
/// How long a rank that failed waits for rank 0 to tell it, and rank 0 for the others to hear it.
const HEARING: Duration = Duration::from_secs(1);
/// How long leaving may take, once all work is done.
const LEAVING: Duration = Duration::from_secs(8);

/// A rank's process.
#[derive(Clone, Serialize, Deserialize, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its number.
    pub rank: usize,
    /// Its host's name; empty if that is not known.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
}

impl Peer {
    /// One of which the number is known alone.
    pub fn unknown(rank: usize) -> Peer {
        Peer { rank, host: String::new(), pid: 0 }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.is_empty() {
            return write!(f, "rank {}", self.rank);
        }
        write!(f, "rank {} (host {}, pid {})", self.rank, self.host, self.pid)
    }
}

/// Why all ranks end.
#[derive(Clone, Serialize, Deserialize, PartialEq, Eq, Debug)]
pub struct Failure {
    /// What the processes exit with.
    pub code: u8,
    /// Which rank, and the cause.
    pub text: String,
}

/// How a process ends that cannot go on.
#[derive(Clone)]
pub struct GiveUp {
    /// Tells why; only one rank does, as far as ranks can still hear each other.
    pub tell: Arc<dyn Fn(&str) + Send + Sync>,
    /// Ends the process at once.
    pub exit: Arc<dyn Fn(u8) + Send + Sync>,
    /// Whether a signal has told the process to end, which it does soon, by itself.
    pub ending: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// The connection to one rank.
pub struct Link {
    peer: Peer,
    stream: TcpStream,
    /// What has come of a line.
    line: Vec<u8>,
    silent: Duration,
    goodbye: bool,
    /// The rank was told to end.
    ending: bool,
    closed: bool,
}

impl Link {
    /// The rank that it leads to.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// To a rank, over a connection on which both have said who they are.
    ///
    /// # Errors
    /// The connection cannot be set up.
    pub fn new(peer: Peer, stream: TcpStream) -> std::io::Result<Link> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Link { peer, stream, line: vec![], silent: Duration::ZERO, goodbye: false, ending: false, closed: false })
    }

    /// Sends a line. If it cannot be sent, reading says why: the connection is closed, or nothing comes from there.
    fn say(&mut self, line: &str) {
        if !self.closed {
            let _ = self.stream.write_all(format!("{line}\n").as_bytes());
        }
    }

    /// Reads what has come; a failure that it says or is. If this process is `ending`, it is none that another that was told to
    /// end has ended first.
    fn hear(&mut self, ending: bool) -> Option<Heard> {
        let mut bytes = [0; 4096];
        while !self.closed {
            match self.stream.read(&mut bytes) {
                Ok(count) if count > 0 => {
                    self.silent = Duration::ZERO;
                    for &byte in &bytes[..count] {
                        if byte != b'\n' {
                            self.line.push(byte);
                        } else if let Some(heard) = self.understand() {
                            return Some(heard);
                        }
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => self.closed = true,
            }
        }
        let text = if self.closed && self.ending {
            if ending {
                return None;
            }
            "was told to end by a signal (SIGTERM) before the work was done".to_owned()
        } else if self.closed && !self.goodbye {
            "has ended before the work was done; what it printed last, or its host's log, may say why".to_owned()
        } else if !self.closed && self.silent >= SILENCE {
            let seconds = SILENCE.as_secs();
            format!("no sign of life for {seconds} s; the process was stopped, or its host cannot be reached")
        } else {
            return None;
        };
        Some(Heard::Found(Failure { code: 1, text: format!("{}: {text}", self.peer) }))
    }

    fn understand(&mut self) -> Option<Heard> {
        let line = std::mem::take(&mut self.line);
        match line.as_slice() {
            b"goodbye" => self.goodbye = true,
            b"ending" => self.ending = true,
            _ => {}
        }
        let failure = line.strip_prefix(b"fail ")?;
        // One that cannot be read is a failure all the same.
        Some(Heard::Said(serde_json::from_slice(failure).unwrap_or_else(|_| Failure {
            code: 1,
            text: format!("{} has failed: {}", self.peer, String::from_utf8_lossy(failure)),
        })))
    }
}

enum Heard {
    /// The rank says it.
    Said(Failure),
    /// The rank is not there.
    Found(Failure),
}

enum Order {
    Fail(Failure),
    Goodbye,
    End,
}

/// The thread that watches.
pub struct Watch {
    me: Peer,
    orders: Sender<Order>,
    thread: JoinHandle<()>,
}

impl Watch {
    /// Begins, with rank 0's connections to all others or another rank's to rank 0.
    pub fn begin(me: Peer, links: Vec<Link>, give_up: GiveUp) -> Watch {
        let (orders, received) = channel();
        let mut thread = Thread {
            me: me.clone(),
            links,
            give_up,
            orders: received,
            beat: BEAT,
            left: None,
            goodbye: None,
            ending: false,
        };
        Watch { me, orders, thread: spawn(move || thread.run()) }
    }

    /// All is done here: the connections may close from now on.
    pub fn say_goodbye(&self) {
        let _ = self.orders.send(Order::Goodbye);
    }

    /// Ends the thread, and nothing else.
    pub fn end(self) {
        let _ = self.orders.send(Order::End);
        let _ = self.thread.join();
    }

    /// This rank cannot go on. All others are told, and the process ends.
    pub fn fail(self, code: u8, text: String) -> ! {
        // How a command is called is no matter of a rank, and who is at fault may be said already.
        let told = code == 2 || text.starts_with("rank ");
        let text = if told { text } else { format!("{}: {text}", self.me) };
        let _ = self.orders.send(Order::Fail(Failure { code, text }));
        let _ = self.thread.join();
        std::process::exit(i32::from(code))
    }
}

struct Thread {
    me: Peer,
    links: Vec<Link>,
    give_up: GiveUp,
    orders: Receiver<Order>,
    /// Time since the last sign of life was given.
    beat: Duration,
    /// When the thread looked last.
    left: Option<Instant>,
    /// Time since all was done here.
    goodbye: Option<Duration>,
    /// The others know that this process was told to end.
    ending: bool,
}

impl Thread {
    fn run(&mut self) {
        loop {
            match self.orders.try_recv() {
                Ok(Order::Fail(failure)) => return self.own_failure(&failure),
                Ok(Order::Goodbye) => {
                    self.links.iter_mut().for_each(|link| link.say("goodbye"));
                    self.goodbye = Some(Duration::ZERO);
                }
                // Whoever gives the orders has gone in a panic: the connections close with the process.
                Ok(Order::End) | Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => sleep(TICK),
            }
            let passed = self.tick();
            if !self.ending && (self.give_up.ending)() {
                self.ending = true;
                self.links.iter_mut().for_each(|link| link.say("ending"));
            }
            for at in 0..self.links.len() {
                match self.links[at].hear(self.ending) {
                    Some(Heard::Said(failure)) if self.me.rank > 0 => return (self.give_up.exit)(failure.code),
                    Some(Heard::Said(failure) | Heard::Found(failure)) => return self.tell(&failure),
                    None => {}
                }
            }
            if let Some(since) = &mut self.goodbye {
                *since += passed;
                if *since > LEAVING {
                    let seconds = LEAVING.as_secs();
                    let text = format!("{}: all was done, but MPI has not let go for {seconds} s", self.me);
                    return self.tell(&Failure { code: 1, text });
                }
            }
        }
    }

    /// Time passes, but no more than a little at once: this process may have been stopped itself.
    fn tick(&mut self) -> Duration {
        let now = Instant::now();
        let passed = self.left.replace(now).map_or(TICK, |before| now - before).min(10 * TICK);
        for link in &mut self.links {
            link.silent += passed;
        }
        self.beat += passed;
        if self.beat >= BEAT {
            self.beat = Duration::ZERO;
            self.links.iter_mut().for_each(|link| link.say("alive"));
        }
        passed
    }

    /// Tells a failure, rank 0 all others too, and ends the process.
    fn tell(&mut self, failure: &Failure) {
        if self.me.rank == 0 {
            self.pass_on(failure);
        }
        (self.give_up.tell)(&failure.text);
        if self.me.rank == 0 {
            self.linger(|_| false);
        }
        (self.give_up.exit)(failure.code);
    }

    /// Tells a failure of this rank's own. If it is not rank 0, rank 0 tells it and answers so.
    fn own_failure(&mut self, failure: &Failure) {
        if self.me.rank == 0 {
            return self.tell(failure);
        }
        self.pass_on(failure);
        if !self.linger(|heard| matches!(heard, Heard::Said(_))) {
            (self.give_up.tell)(&failure.text);
        }
        (self.give_up.exit)(failure.code);
    }

    fn pass_on(&mut self, failure: &Failure) {
        let line = format!("fail {}", serde_json::to_string(failure).unwrap_or_default());
        self.links.iter_mut().for_each(|link| link.say(&line));
    }

    /// Reads on until all connections are closed, or something is heard, or it has been long enough. A connection with unread
    /// lines would be cut when this process ends, and what was said last lost.
    fn linger(&mut self, enough: impl Fn(&Heard) -> bool) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < HEARING && self.links.iter().any(|link| !link.closed) {
            for link in &mut self.links {
                if link.hear(self.ending).is_some_and(|heard| enough(&heard)) {
                    return true;
                }
            }
            sleep(TICK);
        }
        false
    }
}
