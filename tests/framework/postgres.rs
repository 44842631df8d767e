//! A PostgreSQL server on a directory of its own, and a writer that remembers what it was promised.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio_postgres::{Client, NoTls};

use crate::netlab::Ns;
use crate::programs;
use crate::written::{Noting, Written};

/// Where its clients come.
pub const PORT: u16 = 5432;
/// Debian's.
const BIN: &str = "/usr/lib/postgresql/15/bin";
const OWNER: &str = "postgres";
/// How long a connection may take: longer than anybody has it wait.
const CONNECT: Duration = Duration::from_secs(30);
/// How long a transaction of several steps stays open.
const OPEN: Duration = Duration::from_millis(20);

/// A directory of a server and of its socket; gone, with the server, when it is dropped.
#[derive(Debug)]
pub struct Database {
    directory: PathBuf,
}

impl Database {
    /// Makes one, whose clients may come from a network without a password.
    ///
    /// # Errors
    /// If `initdb` fails.
    pub fn new(label: &str, clients: &str) -> anyhow::Result<Self> {
        let directory = std::env::temp_dir().join(format!("patchswitch-{label}-{}", std::process::id()));
        std::fs::create_dir(&directory)?;
        let database = Self { directory };
        programs::run(&["chown", OWNER, database.path()])?;
        let data = database.data();
        database.as_owner("initdb", &["-D", &data, "-A", "trust", "--no-instructions"])?;
        let append = |file: &str, text: String| {
            let path = Path::new(&data).join(file);
            let old = std::fs::read_to_string(&path)?;
            std::fs::write(&path, old + &text)
        };
        append("pg_hba.conf", format!("host all all {clients} trust\n"))?;
        append(
            "postgresql.conf",
            format!("listen_addresses = '*'\nunix_socket_directories = '{}'\n", database.path()),
        )?;
        Ok(database)
    }

    /// Where its socket is.
    pub fn path(&self) -> &str {
        self.directory.to_str().unwrap_or_default()
    }

    /// Where its data are.
    pub fn data(&self) -> String {
        format!("{}/data", self.path())
    }

    fn as_owner(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let path = format!("{BIN}/{program}");
        let user = [format!("--reuid={OWNER}"), format!("--regid={OWNER}")];
        let argv = ["env", "-C", "/", "setpriv", &user[0], &user[1], "--init-groups", "--", &path];
        programs::run(&[&argv, arguments].concat())
    }

    /// Runs it in a namespace.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(&self, ns: &Ns) -> anyhow::Result<()> {
        let (data, log) = (self.data(), format!("{}/log", self.path()));
        ns.enter(|| self.as_owner("pg_ctl", &["start", "-D", &data, "-l", &log, "-w"])).map(drop)
    }

    /// Ends it as somebody does who has time: sessions are ended, everything is written.
    ///
    /// # Errors
    /// If it does not end.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.as_owner("pg_ctl", &["stop", "-D", &self.data(), "-m", "fast"]).map(drop)
    }

    /// What a statement returns, asked past the network.
    ///
    /// # Errors
    /// If it fails.
    pub fn sql(&self, statement: &str) -> anyhow::Result<String> {
        self.as_owner("psql", &["-XAtq", "-h", self.path(), "-d", OWNER, "-c", statement])
    }

    /// The numbers in a table, in their order.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn rows(&self, table: &str) -> anyhow::Result<Vec<i64>> {
        let rows = self.sql(&format!("SELECT n FROM {table} ORDER BY n"))?;
        Ok(rows.lines().map(str::parse).collect::<Result<_, _>>()?)
    }

    /// What its server has written into its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // Ended already: nothing to do.
        drop(self.as_owner("pg_ctl", &["stop", "-D", &self.data(), "-m", "immediate"]));
        drop(std::fs::remove_dir_all(&self.directory));
    }
}

/// How a row is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// By one statement.
    AtOnce,
    /// In a transaction that is open for a while.
    InTransaction,
}

/// Writes numbered rows, one after the other, until it is told to end.
#[derive(Debug)]
pub struct Writer {
    ending: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Written>>,
}

impl Writer {
    /// Starts in a namespace, with a table of its own.
    pub fn start(ns: &Ns, server: IpAddr, table: &'static str, manner: Manner) -> Self {
        Self::start_noting(ns, server, table, manner, (1, Box::new(|_| ())))
    }

    /// As well as that, from a number on, and each one that was acknowledged is noted before the next.
    pub fn start_noting(
        ns: &Ns,
        server: IpAddr,
        table: &'static str,
        manner: Manner,
        noting: Noting,
    ) -> Self {
        let (ns, ending) = (ns.clone(), Arc::<AtomicBool>::default());
        let end = Arc::clone(&ending);
        let thread = std::thread::spawn(move || {
            ns.enter(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(write(SocketAddr::new(server, PORT), (table, manner), noting, &end))
            })
        });
        Self { ending, thread }
    }

    /// Ends it.
    ///
    /// # Errors
    /// If it could not even begin.
    pub fn stop(self) -> anyhow::Result<Written> {
        self.ending.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

async fn write(
    server: SocketAddr,
    (table, manner): (&str, Manner),
    (first, mut note): Noting,
    ending: &AtomicBool,
) -> anyhow::Result<Written> {
    let make = format!("CREATE TABLE IF NOT EXISTS {table} (n bigint PRIMARY KEY)");
    connect(server).await?.batch_execute(&make).await?;
    let (mut written, mut last) = (Written::default(), Instant::now());
    let mut number = first - 1;
    while !ending.load(Ordering::Relaxed) {
        let client = match connect(server).await {
            Ok(client) => client,
            Err(error) => {
                written.refused.push(format!("{error:#}"));
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        written.sessions += 1;
        while !ending.load(Ordering::Relaxed) {
            number += 1;
            if insert(&client, table, number, manner).await.is_err() {
                // Whatever was said: the answer to a COMMIT is what counts, and there was none.
                written.unknown.push(number);
                break;
            }
            written.acknowledged.push(number);
            note(number);
            written.longest = written.longest.max(last.elapsed());
            last = Instant::now();
        }
    }
    Ok(written)
}

async fn connect(server: SocketAddr) -> anyhow::Result<Client> {
    let mut config = tokio_postgres::Config::new();
    config.hostaddr(server.ip()).port(server.port()).user(OWNER).dbname(OWNER).connect_timeout(CONNECT);
    let (client, connection) = config.connect(NoTls).await.context("failed to connect")?;
    // Its end is told to whoever uses the client.
    tokio::spawn(async move { drop(connection.await) });
    Ok(client)
}

async fn insert(
    client: &Client,
    table: &str,
    number: i64,
    manner: Manner,
) -> Result<(), tokio_postgres::Error> {
    let insert = format!("INSERT INTO {table} VALUES ({number})");
    if manner == Manner::InTransaction {
        client.batch_execute("BEGIN").await?;
        client.batch_execute(&insert).await?;
        tokio::time::sleep(OPEN).await;
        return client.batch_execute("COMMIT").await;
    }
    client.batch_execute(&insert).await
}
