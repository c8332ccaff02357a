package cryptohook

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"testing"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/id"
)

const testPassphrase = "a passphrase"

// exportFile is a key export as the specification has it, whatever is in it.
func exportFile(t *testing.T, rounds uint32, plaintext []byte) []byte {
	t.Helper()
	header := make([]byte, 37)
	header[0] = 1
	binary.BigEndian.PutUint32(header[exportRoundsAt:], rounds)
	keys := must(pbkdf2.Key(sha512.New, testPassphrase, header[1:17], int(rounds), 64))
	ciphertext := make([]byte, len(plaintext))
	cipher.NewCTR(must(aes.NewCipher(keys[:32])), header[17:33]).XORKeyStream(ciphertext, plaintext)
	data := append(header, ciphertext...)
	mac := hmac.New(sha256.New, keys[32:])
	mac.Write(data)
	return asExport(mac.Sum(data))
}

func asExport(data []byte) []byte {
	return []byte(exportPrefix + base64.StdEncoding.EncodeToString(data) + "\n" + exportSuffix)
}

func TestKeyExportIsImported(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	waiting, known, disputed := newMegolm(trustRoom), newMegolm(trustRoom), newMegolm(trustRoom)
	said := w.say(alice, waiting, "hello")
	w.sync(syncPart{toDevice: []object{w.share(alice, known), w.share(mallory, disputed)}})
	w.wait(said)
	bad := exported(t, newMegolm(trustRoom), alice)
	bad.SenderKey = ""
	file := exportFile(t, 1000, rawJSON([]*crypto.ExportedSession{
		exported(t, waiting, alice), exported(t, known, alice), exported(t, disputed, alice), bad,
	}))
	w.changes.take()
	result, err := w.hook.ImportKeys(w.ctx, testPassphrase, file)
	if err != nil || result.Total != 4 || result.Imported != 1 || result.Known != 1 || result.Conflicting != 1 || result.Refused != 1 {
		t.Errorf("imported %+v: %v", result, err)
	}
	if sessions, _ := w.changes.take(); !sessions[waiting.id()] || !sessions[disputed.id()] || sessions[known.id()] {
		t.Errorf("told of %v", sessions)
	}
	w.handle()
	seen := w.sawOne(id.EventID(said["event_id"].(string)))
	wantCode(t, seen, CodeAuthenticityNotGuaranteed)
	if seen.body != "hello" || seen.verdict.Source != SourceImport || !seen.verdict.Legacy {
		t.Errorf("read %q: %+v", seen.body, seen.verdict)
	}
	again, err := w.hook.ImportKeys(w.ctx, testPassphrase, bytes.ReplaceAll(bytes.TrimSpace(file), []byte("\n"), []byte("\r\n")))
	if err != nil || again.Imported != 0 || again.Known != 2 || again.Conflicting != 1 {
		t.Errorf("imported %+v again: %v", again, err)
	}
}

func TestKeyExportsThatAreNotValidAreRefused(t *testing.T) {
	good := func(t *testing.T, alice *actorDevice) []byte {
		return rawJSON([]*crypto.ExportedSession{exported(t, newMegolm(trustRoom), alice)})
	}
	dear := func(rounds uint32) func(*testing.T, *actorDevice) []byte {
		return func(*testing.T, *actorDevice) []byte {
			data := make([]byte, 200)
			data[0] = 1
			binary.BigEndian.PutUint32(data[exportRoundsAt:], rounds)
			return asExport(data)
		}
	}
	for name, tc := range map[string]struct {
		file func(t *testing.T, alice *actorDevice) []byte
		want error
	}{
		"nothing":                       {func(*testing.T, *actorDevice) []byte { return nil }, ErrNotAKeyExport},
		"something else":                {func(*testing.T, *actorDevice) []byte { return []byte("Dear diary,") }, ErrNotAKeyExport},
		"the first and last lines only": {func(*testing.T, *actorDevice) []byte { return []byte(exportPrefix + exportSuffix) }, ErrNotAKeyExport},
		"no base64":                     {func(*testing.T, *actorDevice) []byte { return []byte(exportPrefix + "ä\n" + exportSuffix) }, ErrNotAKeyExport},
		"cut off in the header":         {func(*testing.T, *actorDevice) []byte { return asExport(make([]byte, 20)) }, ErrNotAKeyExport},
		"cut off in the hash": {func(*testing.T, *actorDevice) []byte {
			return asExport(append([]byte{1}, make([]byte, exportLeast-2)...))
		}, ErrNotAKeyExport},
		"half of a file": {func(t *testing.T, alice *actorDevice) []byte {
			file := exportFile(t, 1000, good(t, alice))
			return append(file[:len(file)/2], exportSuffix...)
		}, ErrNotAKeyExport},
		"another version": {func(t *testing.T, alice *actorDevice) []byte {
			file := exportFile(t, 1000, good(t, alice))
			file[len(exportPrefix)] = 'B'
			return file
		}, ErrNotAKeyExport},
		"2^31 rounds":   {dear(1 << 31), ErrExportTooDear},
		"2^32-1 rounds": {dear(1<<32 - 1), ErrExportTooDear},
		"no rounds":     {dear(0), ErrExportTooDear},
		"another passphrase": {func(t *testing.T, alice *actorDevice) []byte {
			return exportFile(t, 1000, good(t, alice))
		}, ErrPassphrase},
		"no JSON":           {func(t *testing.T, _ *actorDevice) []byte { return exportFile(t, 1000, []byte("not JSON")) }, ErrNotAKeyExport},
		"no list":           {func(t *testing.T, _ *actorDevice) []byte { return exportFile(t, 1000, []byte(`{}`)) }, ErrNotAKeyExport},
		"a list of nothing": {func(t *testing.T, _ *actorDevice) []byte { return exportFile(t, 1000, []byte(`[null]`)) }, ErrNotAKeyExport},
	} {
		t.Run(name, func(t *testing.T) {
			w, alice, _ := twoPeople(t)
			passphrase := testPassphrase
			if tc.want == ErrPassphrase {
				passphrase = "another"
			}
			result, err := w.hook.ImportKeys(w.ctx, passphrase, tc.file(t, alice))
			if !errors.Is(err, tc.want) || result.Imported != 0 {
				t.Errorf("imported %+v: %v, want %v", result, err, tc.want)
			}
		})
	}
}

func TestImportSaysWhenTheDatabaseFails(t *testing.T) {
	sqliteOnly(t)
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	file := exportFile(t, 1000, rawJSON([]*crypto.ExportedSession{exported(t, s, alice)}))
	if _, err := w.db.Exec(w.ctx, "CREATE TRIGGER full BEFORE INSERT ON crypto_megolm_inbound_session BEGIN SELECT RAISE(FAIL, 'the disk is full'); END"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.hook.ImportKeys(w.ctx, testPassphrase, file); err == nil || errors.Is(err, ErrNotAKeyExport) {
		t.Errorf("error %v", err)
	}
}
