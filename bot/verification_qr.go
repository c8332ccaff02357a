package bot

import (
	"context"
	"encoding/base64"
	"fmt"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
	"rsc.io/qr"
)

// qrDot is how wide a dot of the QR code is, in pixels.
const qrDot = 8

// qrBorder is the white around the code, in dots, on both sides together.
const qrBorder = 8

// paintVerification makes the picture of the bytes that a person's app is to scan. They are one segment of bytes, which all apps can read:
// some take the first segment for all of it. https://spec.matrix.org/v1.16/client-server-api/#qr-code-format
func paintVerification(data []byte) (picture attachmentFile, err error) {
	code, err := qr.Encode(string(data), qr.M)
	if err != nil {
		return picture, fmt.Errorf("failed to make a QR code: %w", err)
	}
	code.Scale = qrDot
	size := (code.Size + qrBorder) * qrDot
	return attachmentFile{
		msgType: event.MsgImage, name: "verification.png", mimeType: "image/png", data: code.PNG(), width: size, height: size,
	}, nil
}

// showQRCode sends the picture into the person's room.
func (v *verifications) showQRCode(ctx context.Context, d *dialogue) {
	file, err := paintVerification(d.qrCode.Bytes())
	if err != nil {
		v.log.Err(err).Msg("Failed to make a QR code")
		return
	}
	content := &event.MessageEventContent{
		MsgType: file.msgType, Body: file.name, FileName: file.name, Mentions: &event.Mentions{},
		Info: &event.FileInfo{MimeType: file.mimeType, Size: len(file.data), Width: file.width, Height: file.height},
	}
	if err = v.bot.upload(ctx, d.roomID, content, file); err != nil {
		v.log.Err(err).Msg("Failed to upload a QR code")
		return
	}
	eventID, sent := v.bot.send(ctx, d.roomID, &event.Content{Parsed: content}, hashOf("verification", d.txnID, "picture"))
	if sent {
		d.notices[eventID] = true
	}
}

// keyBytes decodes a key; nil: it is none.
func keyBytes(key id.Ed25519) []byte {
	raw, err := base64.RawStdEncoding.DecodeString(key.String())
	if err != nil {
		return nil
	}
	return raw
}
