package bot

import (
	"context"
	"strings"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// The command status: the bot's own identity, for people to compare, and how it works.

// selfReport is what the bot knows of itself.
type selfReport struct {
	userID      id.UserID
	deviceID    id.DeviceID
	masterKey   id.Ed25519
	signingKey  id.Ed25519
	published   cryptohook.OwnIdentity
	stats       cryptohook.Stats
	runningFor  time.Duration
	startedAt   time.Time
	mode        string
	requirement string
	operators   int
}

// orderStatus tells people how they can make sure of the bot itself, and what it is busy with.
func (b *Bot) orderStatus(ctx context.Context, o *order) response {
	self := selfReport{
		userID: b.client.UserID, deviceID: b.client.DeviceID, masterKey: b.ownMasterKey(), signingKey: b.hook.Machine().GetAccount().SigningKey(),
		published: b.hook.OwnIdentity(), stats: b.hook.Stats(), startedAt: b.startedAt, runningFor: b.clock().Sub(b.startedAt),
		mode: b.mode(o.evt.RoomID), requirement: b.config.Trust.Requirement, operators: len(b.config.Trust.Operators),
	}
	picture, err := identityCard(self)
	if err != nil {
		return o.failed(ctx, err)
	}
	return response{words: o.speech.status(self), attachments: []attachmentFile{picture}}
}

// status words what the bot knows of itself.
func (s speech) status(self selfReport) words {
	sign := signPlain
	if !self.published.Trusted() {
		sign = signWarning
	}
	return page{
		s.text(sign, "status", vars{"Name": showUser(self.userID)}),
		points{items: []string{
			s.phrase("status.master_key", vars{"Key": showKey(self.masterKey)}),
			s.phrase("status.device", vars{"Device": showName(self.deviceID.String()), "Fingerprint": showKey(self.signingKey)}),
			s.phrase("status.own_"+string(self.published.State), vars{
				"Key": showKey(self.published.PublishedMasterKey), "Time": moment(self.published.CheckedAt),
			}),
		}},
		points{above: s.phrase("status.work", nil), items: []string{
			s.phrase("status.since", vars{"Time": moment(self.startedAt), "For": s.lasting(self.runningFor)}),
			s.phrase("status.mode_"+self.mode, nil),
			s.phrase("status.requirement_"+self.requirement, nil),
			s.countOperators(self.operators),
			s.phrase("status.queues", vars{
				"Queued": self.stats.QueuedEvents, "Waiting": self.stats.WaitingEvents, "Searches": self.stats.KeySearches, "Users": self.stats.PendingUsers,
			}),
			s.backupState(self.stats),
		}},
		advice(s.phrase("status.how", nil)),
		remark(s.phrase("status.picture", nil)),
	}
}

// backupState words whether the keys to messages are kept on the homeserver as well, for a bot that loses its database.
func (s speech) backupState(stats cryptohook.Stats) string {
	switch {
	case stats.KeysToBackUp > 0:
		return s.counted("status.to_back_up", stats.KeysToBackUp, nil)
	case stats.BackedUpAt.IsZero():
		return s.phrase("status.not_backed_up", nil)
	}
	return s.phrase("status.backed_up", vars{"Time": moment(stats.BackedUpAt)})
}

func (s speech) countOperators(count int) string {
	if count == 0 {
		return s.phrase("status.no_operators", nil)
	}
	return s.counted("status.operators", count, nil)
}

// lasting words a time span by its largest unit.
func (s speech) lasting(span time.Duration) string {
	switch {
	case span < time.Minute:
		return s.phrase("status.just_now", nil)
	case span >= 48*time.Hour:
		return s.counted("status.days", int(span/(24*time.Hour)), nil)
	case span >= 2*time.Hour:
		return s.counted("status.hours", int(span/time.Hour), nil)
	}
	return s.counted("status.minutes", int(span/time.Minute), nil)
}

// identityCard is a picture with the bot's keys as a QR code, for people whose other device has a camera: four lines of text, which every
// app that reads such codes shows. The keys are in groups of four, as in the words and as Matrix apps show them.
//
//	@bot:example.org
//	master key: abcd efgh …
//	device: ABCDEFGHIJ
//	device key: abcd efgh …
func identityCard(self selfReport) (picture attachmentFile, err error) {
	return paintCode("sendertrust-identity.png", []byte(identityLines(self)))
}

func identityLines(self selfReport) string {
	return strings.Join([]string{
		self.userID.String(), "master key: " + groups(self.masterKey), "device: " + self.deviceID.String(), "device key: " + groups(self.signingKey),
	}, "\n")
}
