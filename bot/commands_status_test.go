package bot

import (
	"bytes"
	"image"
	"strings"
	"testing"
	"time"

	"github.com/makiuchi-d/gozxing"
	"github.com/makiuchi-d/gozxing/qrcode"
	"maunium.net/go/mautrix/event"

	"sendertrust/cryptohook"
)

func someSelf() selfReport {
	return selfReport{
		userID: "@bot:example.org", deviceID: "BOTDEVICE", masterKey: masterKeyA, signingKey: signingKeyA,
		published: cryptohook.OwnIdentity{State: cryptohook.OwnFine, MasterKey: masterKeyA, PublishedMasterKey: masterKeyA, CheckedAt: time.Date(2026, 5, 6, 7, 8, 0, 0, time.UTC)},
		stats:     cryptohook.Stats{QueuedEvents: 11, WaitingEvents: 12, KeySearches: 13, PendingUsers: 14},
		startedAt: time.Date(2026, 5, 4, 3, 2, 0, 0, time.UTC), runningFor: 52 * time.Hour, mode: ModeReply, requirement: "untrusted", operators: 2,
	}
}

func TestStatusTellsTheBotsKeysAndItsWork(t *testing.T) {
	said := speeches["en"].status(someSelf()).plain()
	for _, part := range []string{
		"ℹ️ I am @bot:example.org.", "AAAA nX4e +/MX", "My device BOTDEVICE", "FFFF nX4e +/MX", "The server shows the same keys", "checked: 2026-05-06 07:08 UTC",
		"Running since 2026-05-04 03:02 UTC (2 days).", "In this room I answer every message.", "I read all messages", "I have 2 operators.",
		"in the queue: 11, of them waiting for something: 12; keys that I look for: 13; accounts to ask the server about: 14", "I have put no keys into a key backup",
	} {
		if !strings.Contains(said, part) {
			t.Errorf("does not say %q:\n%s", part, said)
		}
	}
}

func TestStatusHasWordsForEveryState(t *testing.T) {
	states := constantsOf(t, "ownidentity.go", "Own")
	if len(states) != 6 {
		t.Fatalf("found %d states: %v", len(states), states)
	}
	for _, s := range speeches {
		for _, state := range states {
			self := someSelf()
			self.published.State = cryptohook.OwnState(state)
			if said := s.status(self).plain(); strings.Contains(said, "status.") || strings.HasPrefix(said, signWarning) == self.published.Trusted() {
				t.Errorf("%s: %s", state, said)
			}
		}
		for _, mode := range []string{ModeReply, ModeWarnings, ModeReaction, ModeCommand} {
			for _, requirement := range []string{"untrusted", "cross_signed_or_legacy", "cross_signed"} {
				for _, span := range []time.Duration{0, time.Minute, 90 * time.Minute, 47 * time.Hour, 1000 * time.Hour} {
					for _, backup := range []cryptohook.Stats{{}, {KeysToBackUp: 1}, {BackedUpAt: time.Now()}} {
						self := someSelf()
						self.mode, self.requirement, self.runningFor, self.stats, self.operators = mode, requirement, span, backup, 0
						if said := s.status(self); strings.Contains(said.plain(), "status.") || strings.Contains(said.html(), "no value") {
							t.Errorf("%s, %s, %s: %s", mode, requirement, span, said.plain())
						}
					}
				}
			}
		}
	}
}

// readQR gives what an app that reads such codes shows.
func readQR(t *testing.T, picture []byte) *gozxing.Result {
	t.Helper()
	painted, _, err := image.Decode(bytes.NewReader(picture))
	if err != nil {
		t.Fatal(err)
	}
	bitmap, err := gozxing.NewBinaryBitmapFromImage(painted)
	if err != nil {
		t.Fatal(err)
	}
	// It is told that there is nothing but the code in the picture: one code in thirty has dots that it would take for corners.
	read, err := qrcode.NewQRCodeReader().Decode(bitmap, map[gozxing.DecodeHintType]any{gozxing.DecodeHintType_PURE_BARCODE: true})
	if err != nil {
		t.Fatal(err)
	}
	return read
}

func TestPictureHoldsTheBotsKeys(t *testing.T) {
	picture, err := identityCard(someSelf())
	if err != nil {
		t.Fatal(err)
	}
	want := "@bot:example.org\nmaster key: " + groups(masterKeyA) + "\ndevice: BOTDEVICE\ndevice key: " + groups(signingKeyA)
	if read := readQR(t, picture.data).GetText(); read != want {
		t.Errorf("the code says %q", read)
	}
	config, _, err := image.DecodeConfig(bytes.NewReader(picture.data))
	if err != nil || config.Width != picture.width || config.Height != picture.height || picture.width < 200 || picture.width > 1000 ||
		picture.msgType != event.MsgImage || picture.mimeType != "image/png" || len(picture.data) > 20_000 {
		t.Errorf("%s of %dx%d pixels, said to be %dx%d, %d bytes: %v", picture.mimeType, config.Width, config.Height, picture.width, picture.height, len(picture.data), err)
	}
}

func TestPictureHoldsLongIDs(t *testing.T) {
	self := someSelf()
	self.userID = "@bot:example.org"
	for len(self.userID) < 255 {
		self.userID += "x"
	}
	picture, err := identityCard(self)
	if err != nil {
		t.Fatal(err)
	}
	if read := readQR(t, picture.data).GetText(); !strings.HasPrefix(read, self.userID.String()+"\n") {
		t.Errorf("the code says %q", read)
	}
}
