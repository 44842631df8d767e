//! Archives in the "newc" format of initial RAM disks (Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive under construction. Owner is root, times are 0: the same content gives the same bytes.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub(crate) fn dir(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    pub(crate) fn file(&mut self, name: &str, content: &[u8], mode: u32) {
        self.entry(name, 0o100_000 | mode, content);
    }

    /// The archive. Several may stand one after another in a RAM disk.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        // inode, mode, uid, gid, links, time, size, device (2), special device (2), size of the name, checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_newc() {
        let mut archive = Archive::default();
        archive.dir("boot");
        archive.file("boot/odd", b"twelve..", 0o644);
        archive.file("init", b"x", 0o755);
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8(bytes).unwrap();
        let head = "070701000000020000";
        let at = text.find(head).unwrap();
        assert_eq!(&text[at + 14..at + 22], "000081A4");
        assert!(text[at + 110..].starts_with("boot/odd\0\0twelve..070701"), "{text:?}");
        assert!(text.ends_with("TRAILER!!!\0\0\0\0"));
    }
}
