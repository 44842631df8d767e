//! Servers that say who they are, and the load client, each on a thread of its own in a laboratory's namespace.

use std::sync::mpsc;
use std::thread::JoinHandle;

use anyhow::{Context as _, bail};
use patchswitch_load::client::{self, Settings};
use patchswitch_load::control::{Order, Response, obey};
use patchswitch_load::echo;
use patchswitch_load::report::Run;
use patchswitch_load::serve::{self, ServeSettings};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use crate::netlab::Ns;

/// The TCP port of the service.
pub const PORT: u16 = 80;
/// The UDP port of the service.
pub const ECHO: u16 = 7007;

/// An HTTP server in a namespace; ends when it is dropped.
#[derive(Debug)]
pub struct Server {
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Server {
    /// Serves on wildcard sockets of both families; answers name the tag.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn start(ns: &Ns, tag: &str) -> anyhow::Result<Self> {
        let settings = ServeSettings { port: PORT, tag: tag.to_owned(), close_after: None };
        let (end, ended) = oneshot::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let ns = ns.clone();
        let thread = std::thread::spawn(move || {
            ns.enter(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                tokio::task::LocalSet::new().block_on(&runtime, async {
                    let listeners = serve::listen(settings.port)?;
                    ready.send(())?;
                    let end = async { drop(ended.await) };
                    // Connections that are left do not hold it up: they end with the runtime.
                    tokio::select! {
                        () = serve::serve_until(settings, listeners, std::future::pending()) => {}
                        () = end => {}
                    }
                    Ok(())
                })
            })
        });
        is_ready.recv().context("the server did not start")?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Echoes datagrams on wildcard sockets of both families until the test's process ends.
///
/// # Errors
/// If the port is taken.
pub fn echo_in(ns: &Ns, tag: &'static str) -> anyhow::Result<()> {
    let sockets = ns.enter(|| Ok(echo::bind(ECHO)?))?;
    std::thread::spawn(move || echo::serve(sockets, tag));
    Ok(())
}

/// The load client at work.
#[derive(Debug)]
pub struct Load {
    orders: UnboundedSender<Order>,
    thread: JoinHandle<anyhow::Result<Run>>,
}

impl Load {
    /// Starts in a namespace.
    pub fn start(ns: &Ns, settings: Settings) -> Self {
        let (orders, queue) = unbounded_channel();
        let ns = ns.clone();
        let thread = std::thread::spawn(move || ns.enter(|| Ok(client::run(settings, queue)?)));
        Self { orders, thread }
    }

    /// Gives an order and waits until it is done.
    ///
    /// # Errors
    /// If it is not understood, or the client has ended.
    pub fn order(&self, line: &str) -> anyhow::Result<()> {
        match obey(line, &self.orders) {
            Response::Error(error) => bail!("{line}: {error}"),
            _ => Ok(()),
        }
    }

    /// Ends the run.
    ///
    /// # Errors
    /// If it could not even begin.
    pub fn stop(self) -> anyhow::Result<Run> {
        self.order("stop")?;
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
